#!/usr/bin/env bash
# Library: diffusers 0.42.1 together with transformers 5.24.0, and torch 2.14.1.
#
# A Stable Diffusion pipeline is saved in float16 and loaded by `from_pretrained(folder)`, with no dtype given.
#
# A good guess: all of it comes in float32, diffusers' default, or all of it in float16.
#
# What really happens: UNet and VAE come in float32 and the text encoder in float16. diffusers' models are read as
# float32, and transformers 5 reads a model in the dtype it was saved in. `pipe.dtype` says float16, which holds for the
# text encoder alone. Nothing is logged, and the first picture ends in a RuntimeError about Half and Float.
#
# Whom it concerns: everybody who publishes students in half precision. Users who give no dtype cannot draw. A training
# that reads the frozen text encoder on its own gets half precision without asking for it.
#
# What to do instead: always give `dtype=`, to diffusers and to transformers, for loading a teacher too.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0

cat > "$tmp/finding.py" <<'PYTHON'
import tempfile
from importlib.metadata import version

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

for package in ("torch", "diffusers", "transformers"):
    print(package, version(package))

ABSENT = {"tokenizer": None, "safety_checker": None, "feature_extractor": None}
torch.manual_seed(0)
text = CLIPTextConfig(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    bos_token_id=0, pad_token_id=1, eos_token_id=2,
)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=32, attention_head_dim=4,
)
saved = StableDiffusionPipeline(
    vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8), text_encoder=CLIPTextModel(text), unet=unet,
    scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False, **ABSENT,
).to(torch.float16)


def draw(pipe):
    """What comes of one denoising step for a prompt of seven tokens."""
    with torch.no_grad():
        prompt = pipe.text_encoder(torch.arange(3, 10)[None]).last_hidden_state
    try:
        pipe.set_progress_bar_config(disable=True)
        pipe(prompt_embeds=prompt, negative_prompt_embeds=prompt, num_inference_steps=1, output_type="np")
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "an image"


with tempfile.TemporaryDirectory() as folder:
    saved.save_pretrained(folder)
    found = {}
    for options in ({}, {"dtype": torch.float32}, {"dtype": torch.bfloat16}):
        pipe = StableDiffusionPipeline.from_pretrained(folder, **ABSENT, **options)
        dtypes = [pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype]
        found[options.get("dtype")] = dtypes, pipe.dtype, draw(pipe)
        print(f"{options or 'no dtype'}: UNet, VAE and text encoder {dtypes}, pipe.dtype {pipe.dtype}: {draw(pipe)}")
    alone = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").dtype
    print("CLIPTextModel.from_pretrained alone:", alone)

dtypes, named, drawn = found[None]
assert dtypes == [torch.float32, torch.float32, torch.float16], dtypes
assert named == torch.float16, named
assert drawn.startswith("RuntimeError"), drawn
assert alone == torch.float16, alone
for dtype in (torch.float32, torch.bfloat16):
    assert found[dtype] == ([dtype] * 3, dtype, "an image"), found[dtype]
print("Without a dtype the pipeline has two precisions and cannot draw.")
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
