#!/usr/bin/env bash
# Library: diffusers 0.42.1, with transformers 5.24.0, peft 0.21.2 and torch 2.14.1.
#
# A LoRA in the layout of Kohya's trainers stores a rank and an alpha for every layer. The layer's change is
# up @ down * alpha / rank. Resized LoRAs have many ranks, with an alpha that goes with each.
#
# A good guess: `pipe.load_lora_weights(file)` scales every layer by its own alpha / rank.
#
# What really happens: every layer of the UNet gets the alpha that is most frequent among them, and so for the text
# encoder. Here each layer has alpha = rank, so every scale should be 1. Two thirds of the layers have rank 8. The
# ones of rank 2 are scaled by 8 / 2 = 4. No error is raised. peft warns that alpha_pattern keys matched no
# module, because diffusers made the keys from the names in the file and not from the names of the modules.
#
# Whom it concerns: everybody who loads, compares or fuses resized LoRAs, or distils a teacher with one fused in.
#
# What to do instead: multiply alpha / rank into lora_up, pad all layers with zeros to one rank, and set every alpha
# to that rank. This is exact.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 diffusers==0.42.1 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 safetensors==0.8.0

cat > "$tmp/finding.py" <<'PYTHON'
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

for package in ("torch", "diffusers", "transformers", "peft"):
    print(package, version(package))

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
# Kohya's name of a layer, the module in the pipeline, its rank (and alpha), the layer's outputs and inputs.
LAYERS = [
    *(
        (f"lora_unet_{ATTENTION.replace('.', '_')}_{name}", f"unet.{ATTENTION}.{name}", rank, 64, 64)
        for name, rank in (("to_q", 8), ("to_k", 8), ("to_v", 2))
    ),
    *(
        (
            f"lora_te_text_model_encoder_layers_{i}_self_attn_{name}",
            f"text_encoder.encoder.layers.{i}.self_attn.{name}",
            rank,
            32,
            32,
        )
        for i, rank in ((0, 8), (1, 8), (2, 2))
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    ),
]


def pipeline():
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32, attention_head_dim=4,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8), text_encoder=CLIPTextModel(text),
        tokenizer=None, unet=unet, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


def weight(pipe, module):
    part, _, rest = module.partition(".")
    return getattr(pipe, part).get_submodule(rest).weight.detach().clone()


def scales(tensors):
    """Load the LoRA, and return the ratio of each layer's change to up @ down * alpha / rank, with the warnings."""
    pipe = pipeline()
    before = {module: weight(pipe, module) for _, module, *_ in LAYERS}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_file(tensors, Path(folder, "lora.safetensors"))
        pipe.load_lora_weights(folder, weight_name="lora.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    result = {}
    for key, module, *_ in LAYERS:
        change = weight(pipe, module) - before[module]
        down, up, alpha = (tensors[f"{key}.{n}"] for n in ("lora_down.weight", "lora_up.weight", "alpha"))
        stored = up @ down * alpha / len(down)
        result[module] = ((change * stored).sum() / (stored * stored).sum()).item()
    return result, [str(w.message) for w in caught if "alpha_pattern" in str(w.message)]


torch.manual_seed(1)
tensors, padded = {}, {}
for key, _, rank, outputs, inputs in LAYERS:
    down, up = torch.randn(rank, inputs), torch.randn(outputs, rank)
    tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(float(rank))}
    more = 8 - rank
    padded |= {
        f"{key}.lora_down.weight": torch.cat([down, torch.zeros(more, inputs)]),
        f"{key}.lora_up.weight": torch.cat([up, torch.zeros(outputs, more)], dim=1),
        f"{key}.alpha": torch.tensor(8.0),
    }

found, messages = scales(tensors)
mended, no_messages = scales(padded)
print("Strength of each layer after loading, where 1 is what the file says:")
for _, module, rank, *_ in LAYERS:
    print(f"  rank {rank}, alpha {rank}: {found[module]:.3f} (padded to rank 8: {mended[module]:.3f})  {module}")
print("Warnings:", *messages, sep="\n  ")

for _, module, rank, *_ in LAYERS:
    assert abs(found[module] - 8 / rank) < 1e-3, (module, found[module])
    assert abs(mended[module] - 1) < 1e-3, (module, mended[module])
assert messages and not no_messages
print("Layers of rank 2 act four times as strongly as the file says.")
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
