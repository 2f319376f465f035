"""Published models at full size from their configurations alone, on the meta device: for plans, which need no
weights. The configurations are those of the files on their makers' hub pages.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKLTemporalDecoder,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
)
from diffusers.models.modeling_utils import no_init_weights
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from slimstep.models.families.svd.family import draw_as_the_call
from slimstep.models.families.svd.network import PrunableUNetSpatioTemporalConditionModel
from slimstep.models.families.transformer.others import OF_FAMILIES
from slimstep.models.known import clip_tokenizer
from slimstep.models.reference import BIG_G, CLIP_L, VAE_CONFIGS, VIDEO_CONFIGS
from slimstep.models.sizes import settle_sizes

T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": 32128,
          "feed_forward_proj": "gated-gelu"}  # fmt: skip
VAE = "AutoencoderKL"
CLIP, PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
FLOW = "FlowMatchEulerDiscreteScheduler"
SVD_VAE = {"block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
           "layers_per_block": 2, "sample_size": 768, "scaling_factor": 0.18215, "force_upcast": True}  # fmt: skip
VISION_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
            "patch_size": 14, "image_size": 224, "projection_dim": 1024, "hidden_act": "gelu"}  # fmt: skip
SVD_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "sigma_min": 0.002,
                 "sigma_max": 700.0, "prediction_type": "v_prediction", "timestep_type": "continuous",
                 "timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": True}  # fmt: skip

COGVIDEOX_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
COGVIDEOX_VAE = {"block_out_channels": (128, 256, 256, 512), "down_block_types": ("CogVideoXDownBlock3D",) * 4,
                 "up_block_types": ("CogVideoXUpBlock3D",) * 4, "scaling_factor": 0.7}  # fmt: skip
COGVIDEOX_SCHEDULER = (
    "CogVideoXDDIMScheduler",
    {"beta_end": 0.012, "beta_start": 0.00085, "clip_sample": False, "prediction_type": "v_prediction",
     "rescale_betas_zero_snr": True, "snr_shift_scale": 1.0, "timestep_spacing": "trailing"},
)  # fmt: skip


@dataclass(frozen=True)
class Described:
    """A pipeline. network and vae: their classes, and the fields that are not the class's defaults.

    texts: for each text encoder its class and configuration. scheduler: its class and fields.
    """

    pipeline: str
    network: tuple[str, Mapping[str, Any]]
    vae: tuple[str, Mapping[str, Any]]
    texts: tuple[tuple[str, Mapping[str, Any]], ...]
    scheduler: tuple[str, Mapping[str, Any]]


DESCRIBED = {
    "flux_dev": Described(
        "FluxPipeline",
        ("FluxTransformer2DModel", {"guidance_embeds": True}),
        (VAE, VAE_CONFIGS["flux"]),
        ((CLIP, CLIP_L), (T5, T5_XXL)),
        (FLOW, {"shift": 3.0, "use_dynamic_shifting": True}),
    ),
    "sd35_large": Described(
        "StableDiffusion3Pipeline",
        (
            "SD3Transformer2DModel",
            {"sample_size": 128, "num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64,
             "out_channels": 16, "caption_projection_dim": 2432, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
        ),
        (VAE, {**VAE_CONFIGS["flux"], "scaling_factor": 1.5305, "shift_factor": 0.0609}),
        ((PROJECTED, CLIP_L), (PROJECTED, BIG_G), (T5, T5_XXL)),
        (FLOW, {"shift": 3.0}),
    ),
    "pixart_sigma": Described(
        "PixArtSigmaPipeline",
        (
            "PixArtTransformer2DModel",
            {"sample_size": 128, "caption_channels": 4096, "interpolation_scale": 2,
             "use_additional_conditions": False},
        ),
        (VAE, VAE_CONFIGS["sdxl"]),
        ((T5, T5_XXL),),
        ("DPMSolverMultistepScheduler", {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
    ),
    "cogvideox_5b": Described(
        "CogVideoXPipeline",
        ("CogVideoXTransformer3DModel", COGVIDEOX_5B),
        ("AutoencoderKLCogVideoX", COGVIDEOX_VAE),
        ((T5, T5_XXL),),
        COGVIDEOX_SCHEDULER,
    ),
    "cogvideox_5b_i2v": Described(
        "CogVideoXImageToVideoPipeline",
        (
            "CogVideoXTransformer3DModel",
            {**COGVIDEOX_5B, "in_channels": 32, "use_learned_positional_embeddings": True},
        ),
        ("AutoencoderKLCogVideoX", {**COGVIDEOX_VAE, "invert_scale_latents": True}),
        ((T5, T5_XXL),),
        COGVIDEOX_SCHEDULER,
    ),
}  # fmt: skip


def described_pipeline(name_or_path: str) -> DiffusionPipeline:
    """A pipeline of known configuration without weights, its network prunable. ValueError for an unknown name."""
    if name_or_path in VIDEO_CONFIGS:
        return described_svd(name_or_path)
    if name_or_path not in DESCRIBED:
        names = [*DESCRIBED, *VIDEO_CONFIGS]
        raise ValueError(f"no full-size model is described as {name_or_path!r}; choose from {names}")
    kind = DESCRIBED[name_or_path]
    class_name, fields = kind.network
    vae_class, vae_fields = kind.vae
    scheduler, own = kind.scheduler
    with torch.device("meta"), no_init_weights():
        vae = getattr(diffusers, vae_class)(**vae_fields)
        parts = {"transformer": OF_FAMILIES[class_name](**fields), "vae": vae}
        for n, (encoder, config) in enumerate(kind.texts, 1):
            place = f"_{n}" if n > 1 else ""
            parts |= {f"text_encoder{place}": text_encoder(encoder, config), f"tokenizer{place}": tokenizer(encoder)}
    pipeline = getattr(diffusers, kind.pipeline)(**parts, scheduler=getattr(diffusers, scheduler)(**own))
    pipeline.set_progress_bar_config(disable=True)
    settle_sizes(pipeline)
    return pipeline


def described_svd(name: str) -> StableVideoDiffusionPipeline:
    with torch.device("meta"), no_init_weights():
        unet = PrunableUNetSpatioTemporalConditionModel(**VIDEO_CONFIGS[name])
        vae = AutoencoderKLTemporalDecoder(**SVD_VAE)
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION_H))
    pipeline = StableVideoDiffusionPipeline(  # diffusers makes what blends frames on the CPU
        vae=vae.to("meta"), image_encoder=encoder, unet=unet, scheduler=EulerDiscreteScheduler(**SVD_SCHEDULER),
        feature_extractor=CLIPImageProcessor(size=224, crop_size=224),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    settle_sizes(pipeline)
    draw_as_the_call(pipeline)
    return pipeline


def is_described(model: Mapping[str, Any]) -> bool:
    """Whether a `model` of the configuration is one of these."""
    return model["_target_"] == f"{described_pipeline.__module__}.{described_pipeline.__name__}"


def no_weights(name: str) -> ValueError:
    """The error of a job that needs the weights of one of these."""
    return ValueError(
        f"model.name_or_path={name} is a configuration alone, for plan=true of prune_transformer, prune_unet and "
        "distill_steps; this needs a model with weights: model=path model.name_or_path=FOLDER"
    )


def text_encoder(class_name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    if class_name == T5:
        return T5EncoderModel(T5Config(**config))
    return getattr(transformers, class_name)(CLIPTextConfig(**config))


def tokenizer(class_name: str) -> Any:
    """T5's has no vocabulary: nothing is read with it."""
    if class_name == T5:
        return T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    return clip_tokenizer()
