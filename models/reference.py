"""The UNet configurations of SD-1.5, SD-2.1 and SDXL, for whatever needs their shape and not their weights."""

import torch

from data.seeding import seed_of
from models.unet import PrunableUNet2DConditionModel

SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SD21 = {
    **SD15,
    "sample_size": 96,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SDXL = {
    **SD15,
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CONFIGS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}


def random_unet(name: str, seed: int = 0) -> PrunableUNet2DConditionModel:
    """A UNet of a known configuration with random weights, enough to time it; ValueError for an unknown name."""
    if name not in CONFIGS:
        raise ValueError(f"no UNet configuration is called {name!r}; choose from {list(CONFIGS)}")
    torch.manual_seed(seed_of("random unet", seed))
    return PrunableUNet2DConditionModel(**CONFIGS[name]).eval()
