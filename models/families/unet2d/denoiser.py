"""How diffusers' UNet2DConditionModel is called (models/denoiser.py)."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import NUM_TOKENS, guidance_embed_dim, guidance_embedding
from slimstep.models.families.unet2d.text import pooled_width


@dataclass(frozen=True)
class UNet2DConditionDenoiser:
    """diffusers' UNet2DConditionModel and its prunable subclass, SDXL's included.

    guidance: the scale that a network with guidance embedding takes where a call names none.
    """

    prediction_type: str
    sample_shape: tuple[int, int, int]
    guidance: float | None = None

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
        dtype, options = next(network.parameters()).dtype, dict[str, Any]()
        tensors = cond.to(dtype=dtype).tensors
        if "pooled" in tensors:
            options["added_cond_kwargs"] = {"text_embeds": tensors["pooled"], "time_ids": tensors["time_ids"]}
        if guidance_B is None and self.guidance is not None:
            guidance_B = torch.full((x_t.shape[0],), self.guidance, device=x_t.device)
        if guidance_B is not None:
            options["timestep_cond"] = guidance_embedding(guidance_B, guidance_embed_dim(network)).to(dtype)
        if block_mask_BN is not None:
            options["block_mask"] = block_mask_BN
        text = {"encoder_hidden_states": tensors["text"]}
        return network(x_t.to(dtype), t_B, **text, return_dict=False, **options)[0].to(x_t.dtype)

    def rescaled(self, guided: Tensor, plain: Tensor) -> Tensor:
        return guided

    def example(
        self, network: ModelMixin, batch: int, *, side: int | None = None, tokens: int = NUM_TOKENS,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Conditioning]:  # fmt: skip
        config, (channels, *sides) = network.config, self.sample_shape

        def random(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator).to(network.device, network.dtype)

        x_t = random(channels, *([side, side] if side else sides))
        tensors = {"text": random(tokens, config.encoder_hid_dim or config.cross_attention_dim)}
        if pooled := pooled_width(network):
            tensors |= {"pooled": random(pooled), "time_ids": random(6)}
        return x_t, torch.full((batch,), 500, device=network.device), Conditioning(tensors)
