"""What the UNets of Stable Diffusion and SDXL are conditioned on, from their pipelines' own `encode_prompt`.

Axes: B batch, L tokens, E text width, P pooled width.
"""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from slimstep.models.conditioning import Conditioning
from slimstep.models.sizes import sides_of

ONE_IMAGE = {"num_images_per_prompt": 1}


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], device: str | torch.device) -> Conditioning:
    """A row for each prompt from the pipeline's own `encode_prompt`, which cuts long ones."""
    encoded = pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False, **ONE_IMAGE)
    return named(pipeline, encoded[0], encoded[2] if pooled_width(pipeline.unet) else None)


def encode_unconditional(pipeline: DiffusionPipeline, device: str | torch.device) -> Conditioning:
    """One row: what guidance steers away from, the pipeline's own answer where no negative prompt is given."""
    encoded = pipeline.encode_prompt("", device=device, do_classifier_free_guidance=True, **ONE_IMAGE)
    return named(pipeline, encoded[1], encoded[3] if pooled_width(pipeline.unet) else None)


def named(pipeline: DiffusionPipeline, text_BLE: Tensor, pooled_BP: Tensor | None) -> Conditioning:
    """The conditioning of images that are not cropped and have the size that the UNet makes, as in SDXL's pipelines."""
    if pooled_BP is None:
        return Conditioning({"text": text_BLE})
    if (width := pooled_BP.shape[1]) != (expected := pooled_width(pipeline.unet)):
        raise ValueError(f"{type(pipeline).__name__} pools {width} numbers of a caption, its UNet takes {expected}")
    size = [side * pipeline.vae_scale_factor for side in sides_of(pipeline.unet.config)]
    time_ids_B6 = text_BLE.new_tensor([*size, 0, 0, *size]).expand(len(text_BLE), -1)
    return Conditioning({"text": text_BLE, "pooled": pooled_BP.to(text_BLE.dtype), "time_ids": time_ids_B6})


def pooled_width(unet: ModelMixin) -> int:
    """P, the numbers of the pooled text state that SDXL's UNets take; 0 for others."""
    if unet.config.addition_embed_type != "text_time":
        return 0
    return unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
