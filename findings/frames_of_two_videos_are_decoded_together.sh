#!/usr/bin/env bash
# Library: diffusers 0.42.1, with torch 2.14.1.
#
# Stable Video Diffusion decodes `decode_chunk_size` frames at a time where memory does not suffice for all. Its decoder
# sees the frames of a chunk together, so that neighbours agree.
#
# A good guess: a chunk holds frames of one video, whatever number of images the pipeline is given. A video is then the
# same whether it is decoded alone or in a batch.
#
# What really happens: the frames of all videos of a batch are laid behind one another, and are cut into chunks across
# their ends. Unless the chunk's size divides the number of frames, a chunk holds the last frames of one video and the
# first ones of the next, and its convolutions over time mix the two: 25 frames of Stable Video Diffusion XT by 8, say.
# Both videos have frames that depend on the other's. No word is said.
#
# Whom it concerns: who passes several images, or num_videos_per_prompt, and a decode_chunk_size.
#
# What to do instead: a decode_chunk_size that divides the number of frames (5 of 25, 7 of 14), or one image a call.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0

cat > "$tmp/finding.py" <<'PYTHON'
from importlib.metadata import version

import torch
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline

for package in ("torch", "diffusers"):
    print(package, version(package))

FRAMES = 6
torch.manual_seed(0)
vae = AutoencoderKLTemporalDecoder(
    block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), layers_per_block=1
)
parts = dict.fromkeys(("image_encoder", "unet", "scheduler", "feature_extractor"))
pipeline = StableVideoDiffusionPipeline(vae=vae, **parts)
latents = torch.randn(2, FRAMES, 4, 8, 8)

mixed = {}
for size in (6, 4, 3, 2):
    with torch.no_grad():
        both = pipeline.decode_latents(latents, FRAMES, size)
        alone = torch.cat([pipeline.decode_latents(one[None], FRAMES, size) for one in latents])
    differs = ((both - alone).abs().amax(dim=(1, 3, 4)) > 1e-3).tolist()
    mixed[size] = [sum(video) for video in differs]
    print(f"decode_chunk_size={size}: of {FRAMES} frames of either video {mixed[size]} depend on the other's")

assert not any(sum(mixed[size]) for size in (6, 3, 2)), mixed
assert all(mixed[4]), mixed
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
