#!/usr/bin/env bash
# Library: diffusers 0.42.1, with transformers 5.24.0 and torch 2.14.1.
#
# A StableDiffusion3Pipeline without its third text encoder (T5), which diffusers documents as a way to save memory, is
# saved by `save_pretrained` and loaded by `from_pretrained(folder)`.
#
# A good guess: it loads as it was saved, for model_index.json says [null, null] of both parts that are not there. A
# Stable Diffusion 1 pipeline that was saved without its safety checker does load so.
#
# What really happens: a ValueError that the pipeline expected text_encoder_3 and tokenizer_3. With
# `text_encoder_3=None, tokenizer_3=None` the same folder loads. Only parts that the class lists as optional may be null.
#
# Whom it concerns: everybody who publishes a small Stable Diffusion 3 without T5. Its users cannot load it by the line
# that every model card shows.
#
# What to do instead: say both arguments in the card, or put an encoder of no layers in T5's place.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0

cat > "$tmp/finding.py" <<'PYTHON'
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from diffusers import (
    AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline,
    StableDiffusionPipeline, UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

for package in ("torch", "diffusers", "transformers"):
    print(package, version(package))

CLIP = CLIPTextConfig(
    vocab_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, projection_dim=32,
    bos_token_id=0, pad_token_id=1, eos_token_id=1,
)


def tokenizer(folder):
    """Of one letter."""
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def loaded(pipeline, **options):
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        index = json.loads((Path(folder) / "model_index.json").read_text())
        print({part: value for part, value in index.items() if value == [None, None]})
        try:
            return type(pipeline.from_pretrained(folder, **options)).__name__
        except ValueError as error:
            return f"ValueError: {error}"


with tempfile.TemporaryDirectory() as place:
    words = tokenizer(Path(place))
vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4)
transformer = SD3Transformer2DModel(
    sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
    num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
    pos_embed_max_size=8,
)
sd3 = StableDiffusion3Pipeline(
    transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae,
    text_encoder=CLIPTextModelWithProjection(CLIP), text_encoder_2=CLIPTextModelWithProjection(CLIP),
    tokenizer=words, tokenizer_2=words, text_encoder_3=None, tokenizer_3=None,
)
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=32, attention_head_dim=4,
)
sd1 = StableDiffusionPipeline(
    vae=vae, text_encoder=CLIPTextModel(CLIP), tokenizer=words, unet=unet, safety_checker=None, feature_extractor=None,
    scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False,
)
plain, with_nulls = loaded(sd3), loaded(sd3, text_encoder_3=None, tokenizer_3=None)
other = loaded(sd1)
print("SD3 without T5:", plain)
print("the same with text_encoder_3=None, tokenizer_3=None:", with_nulls)
print("SD1 without safety checker:", other)
assert plain.startswith("ValueError") and "text_encoder_3" in plain and "tokenizer_3" in plain, plain
assert with_nulls == "StableDiffusion3Pipeline", with_nulls
assert other == "StableDiffusionPipeline", other
print("A Stable Diffusion 3 that was saved without T5 loads only where both absent parts are named.")
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
