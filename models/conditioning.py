"""What a UNet is told beside latents and timestep, as one tensor per prompt.

SDXL's UNets also take a pooled text state and six numbers of size and crop. These lie behind the text states, in as
many further rows as they fill, so that whatever caches, drops, repeats or moves captions knows one tensor only; the
prunable UNet takes it apart again (`slimstep.models.unet.apart`).

Axes: B batch, L tokens, R further rows, E text width, P pooled width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from slimstep.models.unet import pooled_width

ONE_IMAGE = {"num_images_per_prompt": 1}


def text_encoders(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """One, or SDXL's two."""
    return [pipeline.text_encoder, *filter(None, [getattr(pipeline, "text_encoder_2", None)])]


def text_states(pipeline: DiffusionPipeline, prompts: Sequence[str], device: str | torch.device) -> Tensor:
    """[B, L + R, E] from the pipeline's own `encode_prompt`, cut where it cuts."""
    encoded = pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False, **ONE_IMAGE)
    return together(pipeline, encoded[0], encoded[2] if is_told_sizes(pipeline) else None)


def empty_text_state(pipeline: DiffusionPipeline, device: str | torch.device) -> Tensor:
    """[1, L + R, E]: what guidance steers away from, the pipeline's answer when no negative prompt is given."""
    encoded = pipeline.encode_prompt("", device=device, do_classifier_free_guidance=True, **ONE_IMAGE)
    return together(pipeline, encoded[1], encoded[3] if is_told_sizes(pipeline) else None)


def is_told_sizes(pipeline: DiffusionPipeline) -> bool:
    return pooled_width(pipeline.unet) > 0


def together(pipeline: DiffusionPipeline, states_BLE: Tensor, pooled_BP: Tensor | None) -> Tensor:
    """States, pooled state, and the size: uncropped images of the size that the UNet makes, as in `__call__`."""
    if pooled_BP is None:
        return states_BLE
    if (given := pooled_BP.shape[1]) != (wanted := pooled_width(pipeline.unet)):
        raise ValueError(f"{type(pipeline).__name__} pools {given} numbers of a caption, its UNet takes {wanted}")
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    sizes_B6 = pooled_BP.new_tensor([size, size, 0, 0, size, size]).expand(len(pooled_BP), -1)
    more_BN = torch.cat([pooled_BP, sizes_B6], dim=1)
    width = states_BLE.shape[2]
    rows_BRE = F.pad(more_BN, (0, -more_BN.shape[1] % width)).unflatten(1, (-1, width))
    return torch.cat([states_BLE, rows_BRE.to(states_BLE)], dim=1)
