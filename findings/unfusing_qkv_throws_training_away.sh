#!/usr/bin/env bash
# Library: diffusers 0.42.1 with torch 2.14.1.
#
# `unet.fuse_qkv_projections()` joins the matrices of query, key and value for speed. The UNet is then trained, and
# `unet.unfuse_qkv_projections()` is called, or the UNet is saved and loaded.
#
# A good guess: unfusing splits the trained matrix, as `fuse_lora` and `unfuse_lora` undo each other without touching
# what else was trained.
#
# What really happens: the old matrices stay beside the fused one, and get no gradient. Unfusing takes them up again
# without a word, so what the fused ones learned is gone, to the last bit. Saving writes both, and loading keeps the old
# ones; the log says that the fused ones were not used. The number of parameters also counts these matrices twice.
#
# Whom it concerns: everybody who turns fusion on before fine-tuning or distillation, or counts parameters of a fused
# teacher.
#
# What to do instead: train and count unfused, and fuse only for sampling. To save a training that was run fused, copy
# the rows of to_qkv and to_kv back into to_q, to_k and to_v first.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 diffusers==0.42.1 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6

cat > "$tmp/finding.py" <<'PYTHON'
import copy
import tempfile
from importlib.metadata import version

import torch
from diffusers import UNet2DConditionModel

for package in ("torch", "diffusers"):
    print(package, version(package))

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=32, attention_head_dim=4,
)
latents, prompt, target = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32), torch.randn(2, 4, 8, 8)


def output(model):
    return model(latents, 500, prompt).sample


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def distance(a, b):
    return (a - b).abs().max().item()


start, parameters = output(unet).detach(), count(unet)
unet.fuse_qkv_projections()
fused_parameters = count(unet)
print(f"{parameters:,} parameters before fusing, {fused_parameters:,} after.")

# Only the fused projections of the attention are trained.
fused = [p for name, p in unet.named_parameters() if ".to_qkv." in name or ".to_kv." in name]
optimizer = torch.optim.AdamW(fused, lr=0.01)
for _ in range(20):
    optimizer.zero_grad()
    (output(unet) - target).square().mean().backward()
    optimizer.step()
trained = output(unet).detach()
idle = [name for name, p in unet.named_parameters() if p.grad is None]
print(f"Training moved the output by {distance(trained, start):.3f}. No gradient reached {len(idle)} matrices.")

with tempfile.TemporaryDirectory() as folder:
    unet.save_pretrained(folder)
    read = UNet2DConditionModel.from_pretrained(folder)
loaded = distance(output(read).detach(), start)

mended = copy.deepcopy(unet)
with torch.no_grad():
    for module in mended.modules():
        for whole, parts in (("to_qkv", ("to_q", "to_k", "to_v")), ("to_kv", ("to_k", "to_v"))):
            if hasattr(module, whole):
                layers = [getattr(module, part) for part in parts]
                rows = getattr(module, whole).weight.split([layer.out_features for layer in layers])
                for layer, weight in zip(layers, rows, strict=True):
                    layer.weight.copy_(weight)
mended.unfuse_qkv_projections()
unet.unfuse_qkv_projections()
unfused = distance(output(unet).detach(), start)
kept = distance(output(mended).detach(), trained)
print(f"After unfusing, the output is {unfused:.2g} from the one before training.")
print(f"After saving and loading, it is {loaded:.2g} from the one before training.")
print(f"With the rows copied back before unfusing it is {kept:.2g} from the trained one.")

assert fused_parameters > parameters
assert distance(trained, start) > 0.01
assert idle and all(name.endswith(("to_q.weight", "to_k.weight", "to_v.weight")) for name in idle), idle
assert unfused < 1e-6 and loaded < 1e-6, (unfused, loaded)
assert kept < 1e-4, kept
print("The training is thrown away.")
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
