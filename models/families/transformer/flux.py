"""FLUX.1: FluxTransformer2DModel, whose first blocks hold image and text apart, and whose others take them as one.

Its latents are packed, two by two, into tokens. It has no classifier-free guidance: dev takes its guidance scale as an
input, schnell has none.

Axes: B batch, L tokens, C channels, H and W height and width in latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.families.transformer.denoiser import TransformerDenoiser
from slimstep.models.families.transformer.family import TransformerFamily
from slimstep.models.families.transformer.networks.flux import PrunableFluxTransformer2DModel

GUIDANCE = 3.5  # the pipeline's default, with which dev is trained further where nothing else is said


class FluxDenoiser(TransformerDenoiser):
    def arguments(
        self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Mapping[str, Tensor], guidance_B: Tensor | None
    ) -> dict[str, Any]:
        height, width = (side // 2 for side in x_t.shape[-2:])
        ids_HW3 = x_t.new_zeros(height, width, 3)
        ids_HW3[..., 1] += torch.arange(height, device=x_t.device)[:, None]
        ids_HW3[..., 2] += torch.arange(width, device=x_t.device)
        if network.config.guidance_embeds and guidance_B is None:
            guidance_B = torch.full((x_t.shape[0],), GUIDANCE, device=x_t.device)
        return {
            "hidden_states": packed(x_t),
            "timestep": t_B.to(x_t.dtype) / 1000,
            "guidance": guidance_B,
            "pooled_projections": cond["pooled"],
            "encoder_hidden_states": cond["text"],
            "img_ids": ids_HW3.view(-1, 3),
            "txt_ids": x_t.new_zeros(cond["text"].shape[1], 3),
        }

    def prediction(self, output: Tensor, x_t: Tensor) -> Tensor:
        return unpacked(output, *x_t.shape[-2:])

    def shapes(self, network: ModelMixin, tokens: int) -> dict[str, tuple[int, ...]]:
        config = network.config
        return {"text": (tokens, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}


def packed(x_BCHW: Tensor) -> Tensor:
    """[B, H/2 · W/2, 4C]: a token for each two by two latents."""
    rows, channels, height, width = x_BCHW.shape
    parts = x_BCHW.view(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(rows, height // 2 * (width // 2), 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`."""
    parts = tokens.view(tokens.shape[0], height // 2, width // 2, tokens.shape[2] // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return parts.reshape(tokens.shape[0], -1, height, width)


def encoded(
    pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device, is_negative: bool, length: int
) -> Conditioning:
    """T5's states, and CLIP's pooled one. Nothing leads away from the empty prompt, which is a dropped caption."""
    text_BLE, pooled_BP, _ = pipeline.encode_prompt(prompts, None, device=device, max_sequence_length=length)
    return Conditioning({"text": text_BLE, "pooled": pooled_BP})


FAMILY = TransformerFamily(
    NAME="FLUX.1: a FluxPipeline with a FluxTransformer2DModel",
    NETWORK=PrunableFluxTransformer2DModel,
    PIPELINES=("FluxPipeline",),
    DENOISER=FluxDenoiser,
    encoded=encoded,
    max_tokens=512,
    packing=2,
    as_tokens=packed,
    own_sigmas=True,
    GUIDES=False,
    single_file=(
        ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"),
        ("single_transformer_blocks.0.proj_mlp.weight", "time_text_embed.text_embedder.linear_1.weight"),
    ),
)
