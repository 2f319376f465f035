"""How diffusers' UNet2DModel is called (models/denoiser.py): with pixels and timesteps, and nothing else."""

from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import NUM_TOKENS


@dataclass(frozen=True)
class UNet2DDenoiser:
    """diffusers' UNet2DModel without classes, and its prunable subclass."""

    prediction_type: str
    sample_shape: tuple[int, int, int]

    def __call__(
        self,
        network: nn.Module,
        x_t: Tensor,
        t_B: Tensor,
        cond: Conditioning,
        *,
        guidance_B: Tensor | None = None,
        block_mask_BN: Tensor | None = None,
    ) -> Tensor:
        assert not cond.tensors and guidance_B is None, f"{[*cond.tensors]} for an unconditional model"
        mask = {} if block_mask_BN is None else {"block_mask": block_mask_BN}
        dtype = next(network.parameters()).dtype
        return network(x_t.to(dtype), t_B, return_dict=False, **mask)[0].to(x_t.dtype)

    def rescaled(self, guided: Tensor, plain: Tensor) -> Tensor:
        return guided

    def example(
        self, network: ModelMixin, batch: int, *, side: int | None = None, tokens: int = NUM_TOKENS,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Conditioning]:  # fmt: skip
        channels, *sides = self.sample_shape
        x_t = torch.randn(batch, channels, *([side, side] if side else sides), generator=generator)
        x_t = x_t.to(network.device, network.dtype)
        return x_t, torch.full((batch,), 500, device=network.device), Conditioning()
