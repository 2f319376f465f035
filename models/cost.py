"""How large and how expensive a network is: parameters, and floating point operations of one forward pass."""

import json
from functools import cache

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
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


def count_activation_bytes(
    unet: UNet2DConditionModel, batch: int, tokens: int = NUM_TOKENS, checkpointing: bool = False
) -> int:
    """Bytes in float32 that a forward of `batch` samples keeps for its backward, parameters not counted.

    Counted on fake CPU tensors, every storage once: the meta device would take the attention that keeps its matrix.
    checkpointing: with gradient checkpointing, what is kept from the forward, and not what is computed again. Mixed
    precision keeps half.
    """
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    denoiser = denoiser_of(unet)
    with FakeTensorMode():
        fake = type(unet).from_config(dict(unet.config)).train()
        if checkpointing:
            fake.enable_gradient_checkpointing()
        inputs = denoiser.example(fake, batch, tokens=tokens)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            denoiser(fake, *inputs)
    weights = {parameter.untyped_storage()._cdata for parameter in fake.parameters()}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
