"""How diffusers' UNetSpatioTemporalConditionModel is called (models/denoiser.py).

Axes: B batch, C channels, F frames, H and W latent size, E width of an image's embedding.
"""

from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import NUM_TOKENS

MIDDLE_TIME = 0.25  # ¼ log σ of σ = e


@dataclass(frozen=True)
class SpatioTemporalDenoiser:
    """diffusers' UNetSpatioTemporalConditionModel and its prunable subclass, which have frames before channels.

    The first frame is a condition: "image", its embedding [B, 1, E], and "image_latents" [B, C, H, W], which every
    frame is given beside its own; "time_ids" [B, 3] are fps − 1, the motion bucket, and the noise that the image was
    given.
    """

    prediction_type: str
    sample_shape: tuple[int, ...]  # C, F, H, W

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
        assert guidance_B is None, "its guidance is from outside"
        dtype = next(network.parameters()).dtype
        tensors = cond.to(dtype=dtype).tensors
        still_BCFHW = tensors["image_latents"][:, :, None].expand(-1, -1, x_t.shape[2], -1, -1)
        sample_BFCHW = torch.cat([x_t.to(dtype), still_BCFHW], dim=1).transpose(1, 2)
        conditions = {"encoder_hidden_states": tensors["image"], "added_time_ids": tensors["time_ids"]}
        mask = {} if block_mask_BN is None else {"block_mask": block_mask_BN}
        pred_BFCHW = network(sample_BFCHW, t_B, **conditions, return_dict=False, **mask)[0]
        return pred_BFCHW.transpose(1, 2).to(x_t.dtype)

    def rescaled(self, guided: Tensor, plain: Tensor) -> Tensor:
        """The scale grows over the frames as in the stock pipeline, from 1, of the first, to that of `guided`."""
        share_F = torch.linspace(0, 1, guided.shape[2], device=guided.device, dtype=guided.dtype)
        return plain + share_F[:, None, None] * (guided - plain)

    def example(
        self, network: ModelMixin, batch: int, *, side: int | None = None, tokens: int = NUM_TOKENS,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Conditioning]:  # fmt: skip
        """Whatever `tokens`, an image's embedding is one."""
        channels, frames, *sides = self.sample_shape
        sides = [side, side] if side else sides
        width = network.config.cross_attention_dim

        def random(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator).to(network.device, network.dtype)

        x_t = random(channels, frames, *sides)
        tensors = {
            "image": random(1, width if isinstance(width, int) else width[0]),
            "image_latents": random(network.config.in_channels - channels, *sides),
            "time_ids": random(3),
        }
        return x_t, torch.full((batch,), MIDDLE_TIME, device=network.device), Conditioning(tensors)
