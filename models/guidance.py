"""UNets that are told their guidance scale, as diffusers' pipelines tell it: one evaluation per step instead of two."""

import math

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from slimstep.models.unet import PrunableUNet2DConditionModel


def told_guidance_width(unet: nn.Module) -> int:
    """The width of the guidance embedding a UNet is fed, 0 for one that is guided from outside."""
    return extract_model_from_parallel(unet, keep_torch_compile=False).config.time_cond_proj_dim or 0


def guidance_embedding(w_B: Tensor, width: int) -> Tensor:
    """[B, width]: the sinusoids of 1000·(w − 1) that diffusers' pipelines pass as `timestep_cond`; width is even."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=w_B.device) * -(math.log(10000) / (half - 1)))
    angles_BF = 1000 * (w_B - 1)[:, None] * frequencies
    return torch.cat([angles_BF.sin(), angles_BF.cos()], dim=1)


def with_told_guidance(unet: PrunableUNet2DConditionModel, width: int) -> PrunableUNet2DConditionModel:
    """A copy that is told its guidance scale, and does not listen yet: its answers are those of `unet`.

    One that is told already is given back as it is; ValueError where its embedding has another width.
    """
    if (own := told_guidance_width(unet)) not in (0, width):
        raise ValueError(f"ladder.guidance_width={width}, but the network is told its guidance in a width of {own}")
    if own:
        return unet
    told = PrunableUNet2DConditionModel.from_config(dict(unet.config), time_cond_proj_dim=width)
    missing, unexpected = told.load_state_dict(unet.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"time_embedding.cond_proj.weight"}, (missing, unexpected)
    nn.init.zeros_(told.time_embedding.cond_proj.weight)
    return told.to(next(unet.parameters()).device).train(unet.training)
