"""Configurations of well-known networks, for whatever needs their shape and not their weights."""

import torch
from diffusers import AutoencoderKL

from slimstep.engine.seeding import seed_of
from slimstep.models.families.svd.network import PrunableUNetSpatioTemporalConditionModel
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel

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
SVD_XT = {"sample_size": 96, "num_attention_heads": (5, 10, 20, 20), "num_frames": 25}
VIDEO_CONFIGS = {"svd_xt": SVD_XT}
# OpenAI's ViT-L/14, and the text halves of OpenCLIP's H/14 (SD-2, without its last layer) and bigG/14 (SDXL's second).
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
          "projection_dim": 768, "hidden_act": "quick_gelu"}  # fmt: skip
VIT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
         "projection_dim": 512, "hidden_act": "gelu"}  # fmt: skip
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
         "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
             "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
VAE_CONFIGS = {
    "sd15": VAE,
    "sdxl": {**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "flux": {
        **VAE,
        "latent_channels": 16,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


def random_unet(name: str, seed: int = 0) -> PrunableUNet2DConditionModel | PrunableUNetSpatioTemporalConditionModel:
    """A UNet of a known configuration with random weights, enough to time it; ValueError for an unknown name."""
    if name not in (*CONFIGS, *VIDEO_CONFIGS):
        raise ValueError(f"no UNet configuration is called {name!r}; choose from {[*CONFIGS, *VIDEO_CONFIGS]}")
    torch.manual_seed(seed_of("random unet", seed))
    if name in VIDEO_CONFIGS:
        return PrunableUNetSpatioTemporalConditionModel(**VIDEO_CONFIGS[name]).eval()
    return PrunableUNet2DConditionModel(**CONFIGS[name]).eval()


def random_vae(name: str, seed: int = 0) -> AutoencoderKL:
    """An autoencoder of a known configuration with random weights; ValueError for an unknown name."""
    if name not in VAE_CONFIGS:
        raise ValueError(f"no autoencoder configuration is called {name!r}; choose from {list(VAE_CONFIGS)}")
    torch.manual_seed(seed_of("random vae", seed))
    return AutoencoderKL(**VAE_CONFIGS[name]).eval()
