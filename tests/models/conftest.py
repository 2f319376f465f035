"""Small random pipelines of Stable Diffusion's topologies."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.unet import PrunableUNet2DConditionModel

SMALL = {"sample_size": 8, "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4, "cross_attention_dim": 12}
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
    "projection_class_embeddings_input_dim": 8 * 6 + 12,
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
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=draw),
    }
    if unet.config.addition_embed_type == "text_time":
        added = {"text_embeds": torch.randn(batch, 12, generator=draw), "time_ids": torch.ones(batch, 6)}
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
    letters = "abcdefghij"
    vocab = {c: i for i, c in enumerate([*letters, *(f"{c}</w>" for c in letters), "<|start|>", "<|end|>"])}
    special = {"bos_token": "<|start|>", "eos_token": "<|end|>", "unk_token": "<|end|>", "pad_token": "<|end|>"}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=5, **special)
    unet = small_stock_unet()
    text_config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text_config).eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    return make_small_pipeline()


def paint(pipeline: StableDiffusionPipeline, **arguments) -> torch.Tensor:
    """Two steps with guidance, always from the same noise; [1, 3, 16, 16] in 0..1."""
    arguments = {"prompt": "a b", "num_inference_steps": 2, "height": 16, "width": 16} | arguments
    draw = torch.Generator().manual_seed(0)
    images = pipeline(**arguments, generator=draw, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)
