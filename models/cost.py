"""How large and how expensive a network is: parameters, and floating point operations of one forward pass."""

import json
from functools import cache

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slimstep.models.denoiser import NUM_TOKENS
from slimstep.models.family import denoiser_of


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_gflops(unet: UNet2DConditionModel, latent_size: int | None = None, batch: int = 1, tokens: int = NUM_TOKENS):
    """10⁹ floating point operations of one forward; a multiply and an add are two, attention's matmuls included.

    latent_size: H = W in latents; the config's sample_size if None. Counted on the meta device: torch misses fused
    attention on CPU tensors in some versions.
    """
    return gflops_of(type(unet), json.dumps(dict(unet.config), default=str), latent_size, batch, tokens)


@cache  # a job asks again for every model of the same architecture
def gflops_of(kind: type[UNet2DConditionModel], config: str, latent_size: int | None, batch: int, tokens: int):
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet = kind.from_config(json.loads(config))
        denoiser = denoiser_of(unet)
        denoiser(unet, *denoiser.example(unet, batch, side=latent_size, tokens=tokens))
    return counter.get_total_flops() / 1e9
