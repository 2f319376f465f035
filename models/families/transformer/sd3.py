"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel in a StableDiffusion3Pipeline.

Its blocks attend to image and text together, and each gives both on, but for the last, which gives on the image alone.
Where the last is removed the new last block gives on the image alone, too.

Axes: B batch, L tokens, E text width, P pooled width, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.families.transformer.denoiser import TransformerDenoiser
from slimstep.models.families.transformer.family import TransformerFamily
from slimstep.models.families.transformer.networks.sd3 import PrunableSD3Transformer2DModel


class SD3Denoiser(TransformerDenoiser):
    def arguments(
        self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Mapping[str, Tensor], guidance_B: Tensor | None
    ) -> dict[str, Any]:
        assert guidance_B is None, "its networks have no guidance embedding"
        text = {"encoder_hidden_states": cond["text"], "pooled_projections": cond["pooled"]}
        return {"hidden_states": x_t, "timestep": t_B, **text}

    def shapes(self, network: ModelMixin, tokens: int) -> dict[str, tuple[int, ...]]:
        config = network.config
        return {"text": (tokens, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}


def encoded(
    pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device, is_negative: bool, length: int
) -> Conditioning:
    """Text states of both CLIPs and T5's behind one another [B, L, E], and the pooled ones [B, P]."""
    options = {"device": device, "do_classifier_free_guidance": is_negative, "num_images_per_prompt": 1,
               "max_sequence_length": length}  # fmt: skip
    states = pipeline.encode_prompt(prompts, None, None, **options)
    text_BLE, pooled_BP = (states[1], states[3]) if is_negative else (states[0], states[2])
    return Conditioning({"text": text_BLE, "pooled": pooled_BP})


FAMILY = TransformerFamily(
    NAME="Stable Diffusion 3: a StableDiffusion3Pipeline with an SD3Transformer2DModel",
    NETWORK=PrunableSD3Transformer2DModel,
    PIPELINES=("StableDiffusion3Pipeline",),
    DENOISER=SD3Denoiser,
    encoded=encoded,
    max_tokens=256,  # also where there is no T5 and its states are zero
    more_tokens=lambda pipeline: pipeline.tokenizer_max_length,
    single_file=(
        ("joint_blocks.0.x_block.attn.qkv.weight",),
        ("pos_embed.proj.weight", "time_text_embed.text_embedder.linear_1.weight"),
    ),
)
