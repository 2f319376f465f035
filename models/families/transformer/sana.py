"""Sana: SanaTransformer2DModel, of linear attention to the image and cross-attention to the text.

It learns a flow, which its pipeline samples with a DPM solver, in the latents of an autoencoder that shrinks by 32.
Captions follow an instruction, of which the network gets nothing but the states of the caption.

Axes: B batch, L tokens, E text width.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.families.transformer.denoiser import TransformerDenoiser
from slimstep.models.families.transformer.family import TransformerFamily
from slimstep.models.families.transformer.networks.sana import PrunableSanaTransformer2DModel


class SanaDenoiser(TransformerDenoiser):
    def arguments(
        self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Mapping[str, Tensor], guidance_B: Tensor | None
    ) -> dict[str, Any]:
        assert guidance_B is None, "its networks have no guidance embedding"
        text = {"encoder_hidden_states": cond["text"], "encoder_attention_mask": cond["text_mask"]}
        return {"hidden_states": x_t, "timestep": t_B * network.config.timestep_scale, **text}

    def prediction(self, output: Tensor, x_t: Tensor) -> Tensor:
        return output[:, : x_t.shape[1]]  # some predict a variance, too

    def shapes(self, network: ModelMixin, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"text": (tokens, network.config.caption_channels), "text_mask": (tokens,)}


def encoded(
    pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device, is_negative: bool, length: int
) -> Conditioning:
    """Gemma's states [B, L, E], and which of them are the caption's [B, L], 1 or 0. The instruction is the default of
    the pipeline's call; the empty prompt has none."""
    instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    options = {"device": device, "max_sequence_length": length, "complex_human_instruction": instruction}
    states = pipeline.encode_prompt(prompts, is_negative, **options)
    text_BLE, mask_BL = states[2:] if is_negative else states[:2]
    return Conditioning({"text": text_BLE, "text_mask": mask_BL.to(text_BLE.dtype)})


FAMILY = TransformerFamily(
    NAME="Sana: a SanaPipeline with a SanaTransformer2DModel",
    NETWORK=PrunableSanaTransformer2DModel,
    PIPELINES=("SanaPipeline",),
    DENOISER=SanaDenoiser,
    encoded=encoded,
    max_tokens=300,
    own_options=lambda scale: {"use_resolution_binning": False},
    refused=("guidance_embeds",),
    single_file=(
        ("attention_y_norm.weight", "blocks.0.mlp.depth_conv.conv.weight"),
        ("caption_norm.weight", "transformer_blocks.0.ff.conv_depth.weight"),
    ),
)
