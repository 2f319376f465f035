"""`Denoiser`: the one way in which sampling, training, timing and counting call a network.

    prediction = denoiser(network, x_t, t_B, cond, guidance_B=None, block_mask_BN=None)

A denoiser knows how its kind of network wants its arguments named and shaped; it holds no weights, so that it calls the
teacher, its students, compiled and sharded wrappers of them alike. Each family has one (models/families/README.md), and
`denoiser_of` of models/family.py finds it.

Axes: B batch, N prunable blocks that a network kept.
"""

import math
from typing import Protocol

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning

NUM_TOKENS = 77


class Denoiser(Protocol):
    """How a kind of network is called.

    prediction_type: what its answer means: epsilon, v_prediction, sample. sample_shape: that of one sample, as
    (4, 64, 64) latents or (3, 32, 32) pixels.
    """

    @property
    def prediction_type(self) -> str: ...
    @property
    def sample_shape(self) -> tuple[int, ...]: ...

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
        """The prediction at x_t [B, *sample_shape], in x_t's dtype; inputs are cast to the network's.

        t_B: one timestep for each row, or one of no axis for all. cond: as many rows, or no tensors. guidance_B: the
        guidance scales, for networks that are distilled to take one. block_mask_BN: bool, False where a row skips a
        block.
        """
        ...

    def rescaled(self, guided: Tensor, plain: Tensor) -> Tensor:
        """What becomes of a guided prediction beside the plain one it was made of: in most pipelines nothing."""
        ...

    def example(
        self, network: nn.Module, batch: int, *, side: int | None = None, tokens: int = NUM_TOKENS,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Conditioning]:  # fmt: skip
        """Random x_t, t_B and cond of the shapes that the network takes, on its device and in its dtype.

        side: the height and width in place of sample_shape's. tokens: those of a prompt.
        """
        ...


def guidance_embed_dim(unet: nn.Module) -> int:
    """The width of the guidance embedding a UNet takes, 0 for one that is guided from outside."""
    config = extract_model_from_parallel(unet, keep_torch_compile=False).config
    return getattr(config, "time_cond_proj_dim", None) or 0


def takes_guidance(network: nn.Module) -> bool:
    """Whether the guidance scale is an input: of UNets that are distilled to it, and of FLUX.1 dev."""
    config = extract_model_from_parallel(network, keep_torch_compile=False).config
    return bool(guidance_embed_dim(network) or getattr(config, "guidance_embeds", False))


def guidance_embedding(w_B: Tensor, width: int) -> Tensor:
    """[B, width]: the sinusoids of 1000·(w − 1) that diffusers' pipelines pass as `timestep_cond`; width is even."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=w_B.device) * -(math.log(10000) / (half - 1)))
    angles_BF = 1000 * (w_B - 1)[:, None] * frequencies
    return torch.cat([angles_BF.sin(), angles_BF.cos()], dim=1)
