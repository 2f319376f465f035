"""Small random networks for every test: Stable Diffusion 1.5's topology at a thousandth of its size, built offline."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from scripts.tiny_tokenizer import MAX_TOKENS, tiny_tokenizer
from slimstep.models.conditioning import Conditioning
from slimstep.models.families.unet2d.denoiser import UNet2DConditionDenoiser

WIDTH = 16
DENOISER = UNet2DConditionDenoiser("v_prediction", (4, 8, 8))


def slow(*values) -> list:
    """Parameters of a test that are for `make slow`, beside fewer that are always tried."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def no_caption(tokens: int = 5) -> Conditioning:
    """What guidance steers away from, in tests that encode nothing."""
    return Conditioning({"text": torch.zeros(1, tokens, WIDTH)})


def tiny_unet() -> UNet2DConditionModel:
    """22 ResNets and 16 cross-attentions, as in SD-1.5."""
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16, 16), norm_num_groups=4, cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )  # fmt: skip


def small_unet() -> UNet2DConditionModel:
    """Two levels, each operation of a network that has four: 8 ResNets and 4 cross-attentions, for jobs."""
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=WIDTH, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
    )  # fmt: skip


def small_pipeline(prediction_type: str = "v_prediction") -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 with two levels. Equal weights at every call."""
    torch.manual_seed(0)
    return tiny_pipeline(prediction_type, unet=small_unet())


def tiny_pipeline(
    prediction_type: str = "epsilon", vae_channels: tuple[int, ...] = (8, 8), unet: UNet2DConditionModel | None = None
) -> StableDiffusionPipeline:
    """16×16 images; the VAE shrinks them by two per level after its first. Equal weights at every call."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS, projection_dim=WIDTH, **special,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=vae_channels, down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(vae_channels), latent_channels=4, sample_size=16, norm_num_groups=4,
        layers_per_block=1,
    )  # fmt: skip
    unet = unet or tiny_unet()
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sdxl_pipeline(prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    """SDXL's topology for 16×16 images, and what it ships with: two text encoders, the second's captions padded with
    "!", a VAE that wants float32, Euler's scheduler, zeros for the empty prompt."""
    plain = tiny_pipeline(prediction_type)
    torch.manual_seed(1)
    second = CLIPTextModelWithProjection(plain.text_encoder.config)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 32), norm_num_groups=4, cross_attention_dim=2 * WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 2, 3), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + WIDTH,
    )  # fmt: skip
    plain.vae.register_to_config(force_upcast=True, scaling_factor=0.13025)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        prediction_type=prediction_type,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=plain.vae, text_encoder=plain.text_encoder, text_encoder_2=second.eval(), tokenizer=plain.tokenizer,
        tokenizer_2=tiny_tokenizer(pad_token="!"), unet=unet.eval(), scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_edm_pipeline(scheduler: EDMEulerScheduler | EDMDPMSolverMultistepScheduler) -> StableDiffusionXLPipeline:
    """Playground v2.5: SDXL with EDM's scheduler, and a VAE that says its latents' mean and deviation."""
    pipeline = tiny_sdxl_pipeline()
    statistics = {"latents_mean": [-1.6, 1.1, -0.4, 0.2], "latents_std": [8.4, 6.1, 4.8, 5.6]}
    pipeline.vae.register_to_config(scaling_factor=0.5, **statistics)
    pipeline.register_modules(scheduler=scheduler)
    return pipeline


def write_tiny_clip(folder: Path) -> None:
    """A random open_clip model as a `local-dir:` folder, with a preprocessing of its own."""
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 24, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    preprocess_cfg = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic"}
    torch.manual_seed(0)
    model = open_clip.CLIP(**model_cfg)
    described = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def write_random_inception(extractor: type[nn.Module], file: Path) -> None:
    """A state dict of torch-fidelity's InceptionV3, at its full size: it has no other."""

    class Random(extractor):
        def load_state_dict(self, _):
            for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
                nn.init.kaiming_normal_(conv.weight)  # features do not vanish over its layers

    torch.manual_seed(0)
    torch.save({}, file)
    torch.save(Random("inception-v3", ["2048"], str(file)).state_dict(), file)
