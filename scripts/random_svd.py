"""A small random Stable Video Diffusion, of the published one's kinds of blocks, built offline."""

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

FRAMES = 3


def small_svd(layers: int = 1, levels: int = 3) -> UNetSpatioTemporalConditionModel:
    """Levels, the innermost of which can go: widths are multiples of diffusers' 32 groups."""
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64, 64)[:levels],
        layers_per_block=1, num_attention_heads=(2, 4, 4)[:levels],
        down_block_types=(*["CrossAttnDownBlockSpatioTemporal"] * (levels - 1), "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", *["CrossAttnUpBlockSpatioTemporal"] * (levels - 1)),
        cross_attention_dim=16, addition_time_embed_dim=8, num_frames=FRAMES,
        projection_class_embeddings_input_dim=24, transformer_layers_per_block=layers,
    )  # fmt: skip
    with torch.no_grad():  # α = ½ everywhere would hide a wrong blend
        for name, parameter in unet.named_parameters():
            if name.endswith("mix_factor"):
                parameter.normal_()
    return unet.eval()


def small_svd_pipeline(levels: int = 3, vae_width: int = 32) -> StableVideoDiffusionPipeline:
    """16×16 images, three frames, with Stable Video Diffusion's scheduler."""
    unet = small_svd(levels=levels)
    torch.manual_seed(0)
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(vae_width,) * 2, down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=2,
        sample_size=16,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56,
        projection_dim=16,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.002,
        sigma_max=700.0, timestep_spacing="leading", steps_offset=1, beta_schedule="scaled_linear",
    )  # fmt: skip
    pipeline = StableVideoDiffusionPipeline(
        vae=vae.eval(), image_encoder=CLIPVisionModelWithProjection(vision).eval(), unet=unet, scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(crop_size=224, size=224),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
