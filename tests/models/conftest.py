"""Small random pipelines of Stable Diffusion's topologies."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from models.unet import PrunableUNet2DConditionModel
from tests.tiny import WIDTH, tiny_pipeline

SMALL = {"sample_size": 8, "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4, "cross_attention_dim": WIDTH}
SD15 = SMALL | {"attention_head_dim": 2}
SD21 = SMALL | {"attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True}
SDXL = SMALL | {
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + WIDTH,
}
SMALL_CONFIGS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}


def small_stock_unet(name: str = "sd15", **fields) -> UNet2DConditionModel:
    """The topology of a well-known UNet with random small weights, in eval mode."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**SMALL_CONFIGS[name], **fields).eval()


def small_inputs(unet: UNet2DConditionModel, batch: int = 3) -> dict:
    """What any UNet of SMALL_CONFIGS takes, as keyword arguments."""
    draw = torch.Generator().manual_seed(1)
    inputs = {
        "sample": torch.randn(batch, 4, 8, 8, generator=draw),
        "timestep": torch.randint(1000, (batch,), generator=draw),
        "encoder_hidden_states": torch.randn(batch, 5, WIDTH, generator=draw),
    }
    if unet.config.addition_embed_type == "text_time":
        added = {"text_embeds": torch.randn(batch, WIDTH, generator=draw), "time_ids": torch.ones(batch, 6)}
        inputs["added_cond_kwargs"] = added
    return inputs


@pytest.fixture(params=SMALL_CONFIGS)
def stock(request) -> UNet2DConditionModel:
    return small_stock_unet(request.param)


@pytest.fixture
def unet() -> PrunableUNet2DConditionModel:
    """A prunable UNet of SD-1.5's topology: 22 ResNets, 16 cross-attentions."""
    return PrunableUNet2DConditionModel.from_unet(small_stock_unet())


def make_small_pipeline() -> StableDiffusionPipeline:
    """A StableDiffusionPipeline of random small networks around a stock UNet; 16×16 images."""
    return tiny_pipeline(unet=small_stock_unet())


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    return make_small_pipeline()


def paint(pipeline: StableDiffusionPipeline, **arguments) -> torch.Tensor:
    """Two steps with guidance, always from the same noise; [1, 3, 16, 16] in 0..1."""
    arguments = {"prompt": "a b", "num_inference_steps": 2, "height": 16, "width": 16} | arguments
    draw = torch.Generator().manual_seed(0)
    images = pipeline(**arguments, generator=draw, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)
