"""A tiny random Stable Diffusion pipeline and small sets of pairs."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from slimstep.data.pixels import BrokenImageError
from slimstep.engine.seeding import generator
from tests.tiny import WIDTH, tiny_pipeline


@pytest.fixture
def pipeline():
    """VAE factor 4, UNet factor 2: sides are multiples of 8. Captions of more than 14 letters are cut."""
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=WIDTH, attention_head_dim=2, sample_size=4,
    )  # fmt: skip
    return tiny_pipeline(vae_channels=(8, 8, 16), unet=unet)


class NoisePairs:
    """Random images with one of three captions; those in `broken` cannot be read. Remembers what was asked for."""

    captions = ("a cat", "two dogs", "a much too long caption")

    def __init__(self, size=10, side=16, broken=(), allowed_broken=0):
        self.size, self.side, self.broken, self.allowed_broken, self.asked = size, side, broken, allowed_broken, []
        self.fingerprint = f"noise/{size}/{side}"

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.asked.append(index)
        if index in self.broken:
            raise BrokenImageError(f"noise-{index} (torn)")
        image = torch.randint(256, (3, self.side, self.side), dtype=torch.uint8, generator=generator("noise", index))
        return {"image": image, "caption": self.captions[index % 3]}


@pytest.fixture
def noise_pairs():
    return NoisePairs
