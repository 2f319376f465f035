#!/usr/bin/env bash
# Library: diffusers 0.42.1, with torch 2.14.1.
#
# `transformer.set_attention_backend(NAME)` says through which kernel the attention of a model is to run, and
# `reset_attention_backend()` takes it back. Two models of one process are compared, one with another kernel.
#
# A good guess: the model that was asked changes, others do not, and what cannot change says so.
#
# What really happens: the call also sets the kernel of the whole process, for every model that was given none, made
# before or after; and the reset leaves that as it is. Stable Diffusion 3, PixArt and Sana call PyTorch's attention
# themselves: they return from the call without a word, with the kernel that they had, while a FLUX beside them changes.
#
# Whom it concerns: everybody who times kernels or compares their images in one process: the row without a kernel runs
# with the one of the row before, and a table of Stable Diffusion 3 compares one kernel with itself.
#
# What to do instead: look whether any `processor` of the model has `_attention_backend`, and after each model set the
# kernel of the process back, or start a process for each.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 diffusers==0.42.1 numpy==2.4.6

cat > "$tmp/finding.py" <<'PYTHON'
import logging
from importlib.metadata import version

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SanaTransformer2DModel, SD3Transformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

logging.disable(logging.WARNING)
for package in ("torch", "diffusers"):
    print(package, version(package))


def flux():
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )


class Names(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def kernel(transformer):
    """The attention kernel that a FLUX transformer runs with: PyTorch's fused one, or its plain arithmetic."""
    inputs = {
        "hidden_states": torch.zeros(1, 16, 4), "encoder_hidden_states": torch.zeros(1, 8, 32),
        "pooled_projections": torch.zeros(1, 32), "timestep": torch.zeros(1), "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    with torch.no_grad(), Names() as names:
        transformer(**inputs)
    return "fused" if any("flash_attention" in name for name in names.seen) else "plain"


before = flux()
print("a FLUX:", kernel(before))
assert kernel(before) == "fused"

sd3 = SD3Transformer2DModel(
    sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
    caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=8,
)
pixart = PixArtTransformer2DModel(
    num_layers=1, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=32, sample_size=8,
)
sana = SanaTransformer2DModel(
    num_layers=1, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
    cross_attention_dim=16, caption_channels=32, sample_size=8,
)
for network in (sd3, pixart, sana):
    network.set_attention_backend("_native_math")
    processors = {type(p).__name__: getattr(p, "_attention_backend", "none") for p in network.attn_processors.values()}
    print(type(network).__name__, "after _native_math:", processors)
    assert set(processors.values()) == {"none"}, "its attention can be chosen now"

print("the FLUX, which nobody touched:", kernel(before))
assert kernel(before) == "plain", "a call for another model leaves it alone now"
sd3.reset_attention_backend()
print("after the reset:", kernel(before), "and a new FLUX:", kernel(flux()))
assert kernel(before) == kernel(flux()) == "plain", "the reset takes it back now"
print("as described")
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
