#!/usr/bin/env bash
# Library: diffusers 0.42.1, with torch 2.14.1.
#
# A part of a pipeline is left out while it is loaded, by from_pretrained(folder, PART=None): to encode prompts without
# the 14 billion weights of a transformer, or to give the pipeline another one afterwards.
#
# A good guess: `DiffusionPipeline.from_pretrained(folder, transformer=None)` gives a pipeline without a transformer, as
# `vae=None` gives one without an autoencoder.
#
# What really happens: of a WanPipeline the transformer is loaded all the same, without a word. By
# `WanPipeline.from_pretrained` it is left out. `transformer` is one of WanPipeline's optional components (Wan 2.2 has
# two), and a None for an optional component is not taken for a choice.
#
# Whom it concerns: who loads pipelines of any kind by DiffusionPipeline and leaves out what does not fit into memory.
#
# What to do instead: load by the class that model_index.json names.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0 ftfy==6.3.1

cat > "$tmp/finding.py" <<'PYTHON'
import sys
from importlib.metadata import version

from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

for package in ("torch", "diffusers"):
    print(package, version(package))

transformer = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=1, rope_max_seq_len=32,
)
vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                       latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer)
pipeline.save_pretrained(sys.argv[1])

found = {}
for kind in (DiffusionPipeline, WanPipeline):
    for part in ("transformer", "vae"):
        loaded = kind.from_pretrained(sys.argv[1], tokenizer=None, text_encoder=None, **{part: None})
        found[kind.__name__, part] = type(getattr(loaded, part)).__name__
        print(f"{kind.__name__}.from_pretrained(…, {part}=None): its {part} is a {found[kind.__name__, part]}")

assert found == {
    ("DiffusionPipeline", "transformer"): "WanTransformer3DModel",
    ("DiffusionPipeline", "vae"): "NoneType",
    ("WanPipeline", "transformer"): "NoneType",
    ("WanPipeline", "vae"): "NoneType",
}, found
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py" "$tmp/wan"
