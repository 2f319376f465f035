"""Wan 2.1: WanTransformer3DModel, which attends to the video, and to the text by cross-attention.

It learns a flow, which its pipeline samples with UniPC. The size and the frames that it draws by itself are its
pipeline's, 480×832 pixels and 81 frames.

Axes: B batch.
"""

from collections.abc import Mapping
from typing import Any

from diffusers import ModelMixin
from torch import Tensor, nn

from slimstep.models.families.transformer.cogvideox import encoded, frames
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
