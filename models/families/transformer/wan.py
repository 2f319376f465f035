"""Wan 2.1: WanTransformer3DModel, which attends to the video, and to the text by cross-attention.

It learns a flow, which its pipeline samples with UniPC. The size and the frames that it draws by itself are its
pipeline's, 480×832 pixels and 81 frames.

Axes: B batch, L tokens, E text width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.families.transformer.cogvideox import frames
from slimstep.models.families.transformer.denoiser import TransformerDenoiser
from slimstep.models.families.transformer.family import TransformerFamily
from slimstep.models.families.transformer.networks.wan import PrunableWanTransformer3DModel


class WanDenoiser(TransformerDenoiser):
    def arguments(
        self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Mapping[str, Tensor], guidance_B: Tensor | None
    ) -> dict[str, Any]:
        assert guidance_B is None, "its networks have no guidance embedding"
        return {"hidden_states": x_t, "timestep": t_B, "encoder_hidden_states": cond["text"]}

    def shapes(self, network: ModelMixin, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"text": (tokens, network.config.text_dim)}


def encoded(
    pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device, is_negative: bool, length: int
) -> Conditioning:
    """UMT5's states [B, L, E] of captions, and zeros behind each. They are those of the pipeline's `encode_prompt`,
    which cuts each caption to a length of its own and fills it up again. AOTInductor compiles no such lengths
    (findings/aotinductor_cannot_cut_to_a_length_of_the_data.sh)."""
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    tokens = pipeline.tokenizer([prompt_clean(prompt) for prompt in prompts], return_attention_mask=True, **options)
    mask_BL = tokens.attention_mask.to(device)
    states_BLE = pipeline.text_encoder(tokens.input_ids.to(device), mask_BL).last_hidden_state
    return Conditioning({"text": states_BLE * mask_BL[..., None].to(states_BLE.dtype)})


FAMILY = TransformerFamily(
    NAME="Wan 2.1: a WanPipeline with a WanTransformer3DModel",
    NETWORK=PrunableWanTransformer3DModel,
    PIPELINES=("WanPipeline",),
    DENOISER=WanDenoiser,
    encoded=encoded,
    max_tokens=512,
    latent_frames=frames,
    refused=("boundary_ratio", "expand_timesteps", "image_dim", "added_kv_proj_dim"),
    single_file=(
        ("patch_embedding.weight", "blocks.0.self_attn.q.weight", "text_embedding.0.weight"),
        ("patch_embedding.weight", "blocks.0.attn1.to_q.weight", "condition_embedder.text_embedder.linear_1.weight"),
    ),
)
