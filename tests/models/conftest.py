"""Small random pipelines of Stable Diffusion's topologies."""

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

import slimstep.models.known
import slimstep.models.reference as reference
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.known import random_pipeline
from tests.tiny import WIDTH, tiny_pipeline, tiny_tokenizer

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


@pytest.fixture
def small_kinds(monkeypatch):
    """The known kinds of pipelines at small sizes, still told apart by what diffusers looks at."""
    text = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "projection_dim": WIDTH}  # fmt: skip
    own = {
        "CLIP_L": {"hidden_act": "quick_gelu"},
        "VIT_H": {"hidden_act": "gelu", "hidden_size": 1024, "vocab_size": 64},
        "BIG_G": {"hidden_act": "gelu", "hidden_size": 8, "projection_dim": WIDTH, "num_hidden_layers": 10},
    }
    for name, fields in own.items():
        monkeypatch.setattr(reference, name, text | fields)
    tokenizer = lambda pad=None: tiny_tokenizer(pad or "<|endoftext|>")  # noqa: E731
    monkeypatch.setattr(slimstep.models.known, "clip_tokenizer", tokenizer)
    widths = {"sd15": WIDTH, "sd21": 1024, "sdxl": WIDTH + 8}
    for name, unet in SMALL_CONFIGS.items():
        fields = unet | {"layers_per_block": 2, "cross_attention_dim": widths[name]}
        monkeypatch.setitem(reference.CONFIGS, name, fields)
    for name in ("sd15", "sdxl"):
        vae = reference.VAE_CONFIGS[name] | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
        monkeypatch.setitem(reference.VAE_CONFIGS, name, vae | {"layers_per_block": 1})


def small_kind(name: str, prediction_type: str | None = None) -> DiffusionPipeline:
    """A random pipeline of a known kind, with `small_kinds`; norms and biases that show."""
    pipeline = random_pipeline(name)
    draw = torch.Generator().manual_seed(2)
    for part in (p for p in pipeline.components.values() if isinstance(p, torch.nn.Module)):
        for weight in part.parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=draw)
    if prediction_type:
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type=prediction_type)
        pipeline.register_modules(scheduler=scheduler)
    return pipeline


def assert_equal_weights(ours: DiffusionPipeline, theirs: DiffusionPipeline) -> None:
    """Every network bit for bit."""
    parts = [part for part, network in theirs.components.items() if isinstance(network, torch.nn.Module)]
    assert parts and all(getattr(ours, part) is not None for part in parts)
    for part in parts:
        own, other = (getattr(pipeline, part).state_dict() for pipeline in (ours, theirs))
        assert own.keys() == other.keys(), part
        assert all(torch.equal(own[key], other[key]) and own[key].dtype == other[key].dtype for key in own), part
