#!/usr/bin/env bash
# Library: diffusers 0.42.1, with torch 2.14.1.
#
# Depth pruning removes whole blocks of a diffusion transformer, numbers the others anew and lowers the number of
# layers in config.json. Most classes of diffusers then load the file, and it computes what the pruned network computes.
#
# A good guess: where the file loads with every key matched, this is so.
#
# What really happens: in two classes it is another function, and nothing says so. ChromaTransformer2DModel takes all
# modulations from one approximator, a row for each block by its number, counted from the front and across both lists:
# behind a removed block each block gets the rows of its neighbours. AceStepTransformer1DModel lets its layers attend to
# their neighbours (even numbers) and to all (odd numbers) in turn: behind a removed layer they change places. With
# sequences no longer than the sliding window, as in small tests, even that is not seen.
#
# Whom it concerns: everybody who prunes, merges or stitches these networks, and LoRAs and tools that renumber blocks.
#
# What to do instead: compare with the whole network in which the block gives back its input. For ACE-Step write
# `layer_types` of the layers that stay into config.json; for Chroma no configuration of the stock class helps.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0

cat > "$tmp/finding.py" <<'PYTHON'
import re
from importlib.metadata import version

import torch
from diffusers import AceStepTransformer1DModel, ChromaTransformer2DModel, FluxTransformer2DModel

for package in ("torch", "diffusers"):
    print(package, version(package))

DRAW = torch.Generator().manual_seed(0)
LAYERS, GONE = 4, 1


def draw(*shape):
    return torch.randn(*shape, generator=DRAW)


def outputs(network, inputs):
    with torch.no_grad():
        return network(**inputs, return_dict=False)[0]


def without_block(kind, config, count, blocks, given_back, inputs, **more):
    """How far the stock class of one layer less is from the whole network whose block GONE gives back its input."""
    torch.manual_seed(0)
    whole = kind(**config, **{count: LAYERS}).eval()
    for parameter in whole.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.data = draw(*parameter.shape) * 0.3
    before = outputs(whole, inputs)

    def skip(block, args, kwargs, output):
        return given_back(args, kwargs)

    handle = getattr(whole, blocks)[GONE].register_forward_hook(skip, with_kwargs=True)
    expected = outputs(whole, inputs)
    handle.remove()

    weights = {}
    for key, value in whole.state_dict().items():
        match = re.fullmatch(rf"{blocks}\.(\d+)\.(.*)", key)
        number = int(match[1]) if match else -1
        if number != GONE:
            weights[f"{blocks}.{number - (number > GONE)}.{match[2]}" if match else key] = value
    pruned = kind(**config, **{count: LAYERS - 1}, **more).eval()
    pruned.load_state_dict(weights)  # strict: every key is matched
    effect = (expected - before).abs().max().item()
    assert effect > 1e-2, effect
    return (outputs(pruned, inputs) - expected).abs().max().item(), effect


def both(args, kwargs):
    return kwargs["encoder_hidden_states"], kwargs["hidden_states"]


joint = dict(patch_size=1, in_channels=4, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=32, axes_dims_rope=[4, 4, 8])
tokens = dict(hidden_states=draw(1, 16, 4), encoder_hidden_states=draw(1, 48, 32), img_ids=draw(16, 3),
              txt_ids=draw(48, 3), timestep=torch.ones(1))
flux, _ = without_block(FluxTransformer2DModel, {**joint, "pooled_projection_dim": 32}, "num_layers",
                        "transformer_blocks", both, {**tokens, "pooled_projections": draw(1, 32)})
print(f"FLUX, for comparison: {flux:.1e} from the network without the block")
assert flux < 1e-5, flux

approximator = dict(approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1)
chroma, effect = without_block(ChromaTransformer2DModel, {**joint, **approximator}, "num_layers",
                               "transformer_blocks", both, tokens)
print(f"Chroma: {chroma:.3f} from the network without the block, whose removal changes {effect:.3f}")
assert chroma > 1e-2, chroma

audio = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, sliding_window=2)
kept = ["sliding_attention", "sliding_attention", "full_attention"]  # of the layers 0, 2 and 3
for length, more, is_equal in ((2, {}, True), (64, {}, False), (64, {"layer_types": kept}, True)):
    sound = dict(hidden_states=draw(2, length, 8), timestep=draw(2), timestep_r=draw(2),
                 encoder_hidden_states=draw(2, 10, 32), context_latents=draw(2, length, 16))
    off, effect = without_block(AceStepTransformer1DModel, audio, "num_hidden_layers", "layers",
                                lambda args, kwargs: kwargs["hidden_states"], sound, **more)
    how = "layer_types written" if more else "num_hidden_layers lowered"
    print(f"ACE-Step, {length} frames, {how}: {off:.1e} from the network without the layer, whose removal changes {effect:.3f}")
    assert (off < 1e-5) == is_equal, (length, more, off)
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
