"""Which other programs read an export: the published networks that their tables name, and what pruning makes of it."""

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from slimstep.models.readers import readers

DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD15 = {"cross_attention_dim": 768}
SDXL = {
    "block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", DOWN, DOWN),
    "up_block_types": (UP, UP, "UpBlock2D"), "cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10),
}  # fmt: skip
SSD_1B = {
    **SDXL, "transformer_layers_per_block": (1, 2, 4), "mid_block_type": "UNetMidBlock2D",
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
}  # fmt: skip
KOALA_700M = {
    **SDXL, "layers_per_block": 1, "transformer_layers_per_block": (1, 2, 5), "mid_block_type": None,
}  # fmt: skip
BK_SDM_TINY = {
    "block_out_channels": (320, 640, 1280), "down_block_types": (DOWN,) * 3, "up_block_types": (UP,) * 3,
    "layers_per_block": 1, "mid_block_type": None, "cross_attention_dim": 768,
}  # fmt: skip
FLUX = {"num_attention_heads": 24, "joint_attention_dim": 4096}
QWEN = {"num_attention_heads": 24}
SD35_LARGE = {"num_attention_heads": 38, "attention_head_dim": 64}


@pytest.mark.parametrize(("kind", "config", "comfy", "cpp"), [
    (UNet2DConditionModel, SD15, True, True),
    (UNet2DConditionModel, {**SD15, "block_out_channels": (160, 320, 640, 640)}, False, False),
    (UNet2DConditionModel, {**SD15, "mid_block_type": None}, False, False),
    (UNet2DConditionModel, SDXL, True, True),
    (UNet2DConditionModel, SSD_1B, True, True),
    (UNet2DConditionModel, KOALA_700M, True, False),
    (UNet2DConditionModel, BK_SDM_TINY, False, True),
    (FluxTransformer2DModel, {**FLUX, "num_layers": 8, "num_single_layers": 38}, True, True),
    (FluxTransformer2DModel, {**FLUX, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}, False, False),
    (QwenImageTransformer2DModel, {**QWEN, "num_layers": 30}, True, True),
    (PixArtTransformer2DModel, {"num_layers": 14, "caption_channels": 4096}, True, False),
    (SD3Transformer2DModel, {**SD35_LARGE, "num_layers": 38}, True, True),
    (SD3Transformer2DModel, {**SD35_LARGE, "num_layers": 30}, False, True),
    (SD3Transformer2DModel, {**SD35_LARGE, "num_layers": 20}, False, False),
    (SanaTransformer2DModel, {"num_layers": 2}, False, False),
])  # fmt: skip
def test_their_rules(kind, config, comfy, cpp):
    with torch.device("meta"):
        network = kind(**config)
    said = {program: reading.reads for program, reading in readers(network, ()).items()}
    assert said == {"diffusers": True, "ComfyUI": comfy, "stable-diffusion.cpp": cpp}
    assert all(reading.why for reading in readers(network, ()).values())


def test_nobody_else_has_a_class_that_travels_with_the_folder():
    with torch.device("meta"):
        said = readers(UNet2DConditionModel(**SD15), ["up_blocks.1.attentions.2 is removed"])
    assert said["diffusers"].reads and not said["ComfyUI"].reads and not said["stable-diffusion.cpp"].reads
