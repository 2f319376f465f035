"""How transformers are called (models/denoiser.py): by names, with text and whatever else their family adds.

Axes: B batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import NUM_TOKENS


@dataclass(frozen=True)
class TransformerDenoiser:
    """A family's own says `arguments` and `shapes`, and, where its network packs latents, `prediction`."""

    prediction_type: str
    sample_shape: tuple[int, ...]

    def arguments(
        self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Mapping[str, Tensor], guidance_B: Tensor | None
    ) -> dict[str, Any]:
        """What the network is called with."""
        raise NotImplementedError

    def shapes(self, network: ModelMixin, tokens: int) -> dict[str, tuple[int, ...]]:
        """{name: shape without the batch} of what a sample is conditioned on."""
        raise NotImplementedError

    def prediction(self, output: Tensor, x_t: Tensor) -> Tensor:
        """The prediction, shaped as x_t, in the network's output."""
        return output

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
        dtype = next(network.parameters()).dtype
        t_B = t_B.expand(x_t.shape[0]) if t_B.ndim == 0 else t_B
        mask = {} if block_mask_BN is None else {"block_mask": block_mask_BN}
        inputs = self.arguments(network, x_t.to(dtype), t_B, cond.to(dtype=dtype).tensors, guidance_B)
        return self.prediction(network(**inputs, return_dict=False, **mask)[0], x_t).to(x_t.dtype)

    def rescaled(self, guided: Tensor, plain: Tensor) -> Tensor:
        return guided

    def example(
        self, network: ModelMixin, batch: int, *, side: int | None = None, tokens: int = NUM_TOKENS,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Conditioning]:  # fmt: skip
        *others, height, width = self.sample_shape

        def random(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator).to(network.device, network.dtype)

        x_t = random(*others, side or height, side or width)
        tensors = {name: random(*shape) for name, shape in self.shapes(network, tokens).items()}
        return x_t, torch.full((batch,), 500.0, device=network.device), Conditioning(tensors)
