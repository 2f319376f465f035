#!/usr/bin/env bash
# Library: diffusers 0.42.1, with torch 2.14.1.
#
# CogVideoX-5B-I2V has a table of learnt positions for 49 frames of 480×720 in its weights, which it adds to its tokens
# (`use_learned_positional_embeddings`). Of another height or width diffusers says so in an error: "It is currently not
# possible to generate videos at a different resolution that the defaults".
#
# A good guess: another num_frames is refused as another size is, or takes the learnt positions of as many frames.
#
# What really happens: for any other number of frames the learnt table is left out, and sines and cosines are added in its
# place, which the network never saw. No word is said, and the first frames of a shorter video, which have places in
# the table, get other positions, too.
#
# Whom it concerns: who draws shorter or longer videos with CogVideoXImageToVideoPipeline, as a call with num_frames=25, or
# trains on clips of another length.
#
# What to do instead: 49 frames; a shorter video is the beginning of one.
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
from diffusers import CogVideoXTransformer3DModel

for package in ("torch", "diffusers"):
    print(package, version(package))

torch.manual_seed(0)
network = CogVideoXTransformer3DModel(
    num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=16, text_embed_dim=16,
    num_layers=1, sample_width=4, sample_height=4, sample_frames=9, use_rotary_positional_embeddings=True,
    use_learned_positional_embeddings=True,
)
embed = network.patch_embed
embed.pos_embedding.normal_()  # as if learnt
text = torch.randn(1, 226, 16)


def positions(latents: int, side: int = 4) -> torch.Tensor:
    """What is added to the tokens of a video of so many latents."""
    x = torch.randn(1, latents, 8, side, side)
    with torch.no_grad():
        added = embed(text, x)
        embed.use_positional_embeddings = embed.use_learned_positional_embeddings = False
        plain = embed(text, x)
    embed.use_learned_positional_embeddings = True
    return added - plain


assert "pos_embedding" in embed.state_dict()
learnt = embed.pos_embedding
whole, shorter = positions(3), positions(2)
sines = embed._get_positional_embeddings(4, 4, 5)
of_whole = (whole - learnt).abs().max().item()
of_shorter = (shorter - learnt[:, : shorter.shape[1]]).abs().max().item()
of_sines = (shorter - sines).abs().max().item()
print(f"9 frames: what is added is within {of_whole:.1e} of the learnt table")
print(f"5 frames: it is {of_shorter:.1f} from the table's first rows, and within {of_sines:.1e} of sines and cosines")
try:
    positions(3, side=8)
    refused = False
except ValueError as error:
    refused = "different resolution" in str(error)
print("another size is refused:", refused)
assert of_whole < 1e-5 and of_shorter > 1 and of_sines < 1e-5 and refused
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
