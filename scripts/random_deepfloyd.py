"""Small random stages of DeepFloyd IF, of the published ones' kinds of blocks, built offline."""

import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel

from scripts.random_transformers import TEXT_WIDTH, alive, small_t5
from scripts.tiny_tokenizer import tiny_tokenizer
from slimstep.models.denoiser import NUM_TOKENS

SCHEDULER = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "thresholding": True,
             "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}  # fmt: skip
WITHOUT = {"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False}


def small_if_unet(levels: int = 3, **fields) -> UNet2DConditionModel:
    """16×16 pixels, attention in all levels but the outermost, as IF-I has it; random weights, equal at every call."""
    torch.manual_seed(0)
    fields = {"sample_size": 16, "in_channels": 3, "layers_per_block": 2, **fields}
    return alive(UNet2DConditionModel(
        out_channels=6, block_out_channels=(8, 16, 16)[:levels], norm_num_groups=4, act_fn="gelu", attention_head_dim=4,
        cross_attention_dim=32, cross_attention_norm="group_norm", encoder_hid_dim=TEXT_WIDTH,
        addition_embed_type="text", addition_embed_type_num_heads=2, resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * (levels - 1)),
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * (levels - 1), "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", **fields,
    ))  # fmt: skip


def small_if_pipeline(unet: UNet2DConditionModel | None = None, **scheduler) -> IFPipeline:
    """With T5, DDPM, a learned variance and dynamic thresholding, and without the checkers of images."""
    made = DDPMScheduler(**{**SCHEDULER, **scheduler})
    parts = {"tokenizer": tiny_tokenizer(), "text_encoder": small_t5(), "unet": unet or small_if_unet()}
    parts["tokenizer"].model_max_length = NUM_TOKENS
    pipeline = IFPipeline(scheduler=made, **parts, **WITHOUT)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def small_if_second_unet(levels: int = 3, **fields) -> UNet2DConditionModel:
    """32×32 pixels beside a picture as large and its noise level; ResNets divide what they add up, as IF-II's do."""
    divided = {"resnet_out_scale_factor": 2**0.5, "mid_block_scale_factor": 2**0.5, "resnet_skip_time_act": True}
    own = {"sample_size": 32, "in_channels": 6, "class_embed_type": "timestep", "layers_per_block": 1}
    return small_if_unet(levels, **{**divided, **own, **fields})


def small_if_second_pipeline(unet: UNet2DConditionModel | None = None, **scheduler) -> IFSuperResolutionPipeline:
    """What makes the pictures of `small_if_pipeline` twice as large."""
    first = small_if_pipeline(sample_max_value=1.0, **scheduler)
    parts = {name: getattr(first, name) for name in ("tokenizer", "text_encoder", "scheduler")}
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    pipeline = IFSuperResolutionPipeline(
        unet=unet or small_if_second_unet(), image_noising_scheduler=noising, **parts, **WITHOUT
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
