"""PixArt-α and PixArt-Σ: PixArtTransformer2DModel, which attends to the text by cross-attention.

It learns by betas and predicts ε, beside a variance that sampling leaves aside. Captions have a mask.

Axes: B batch, L tokens, E text width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning, cleans_captions
from slimstep.models.families.transformer.denoiser import TransformerDenoiser
from slimstep.models.families.transformer.family import TransformerFamily
from slimstep.models.families.transformer.networks.pixart import PrunablePixArtTransformer2DModel

TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # the pipelines' defaults
PIXELS_PER_LATENT = 8


class PixArtDenoiser(TransformerDenoiser):
    def arguments(
        self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Mapping[str, Tensor], guidance_B: Tensor | None
    ) -> dict[str, Any]:
        assert guidance_B is None, "its networks have no guidance embedding"
        text = {"encoder_hidden_states": cond["text"], "encoder_attention_mask": cond["text_mask"]}
        return {"hidden_states": x_t, "timestep": t_B, "added_cond_kwargs": self.size(network, x_t), **text}

    def size(self, network: nn.Module, x_t: Tensor) -> dict[str, Tensor | None]:
        """The image's size, which PixArt-α of 1024 pixels takes as an input; others do not."""
        if not network.config.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (PIXELS_PER_LATENT * side for side in x_t.shape[-2:])
        # By columns: a list of sides would be one size for every graph that is made of it.
        height_B1, width_B1 = (x_t.new_full((x_t.shape[0], 1), side) for side in (height, width))
        aspect_ratio_B1 = x_t.new_full((x_t.shape[0], 1), height / width)
        return {"resolution": torch.cat([height_B1, width_B1], 1), "aspect_ratio": aspect_ratio_B1}

    def prediction(self, output: Tensor, x_t: Tensor) -> Tensor:
        return output[:, : x_t.shape[1]]

    def shapes(self, network: ModelMixin, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"text": (tokens, network.config.caption_channels), "text_mask": (tokens,)}


def encoded(
    pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device, is_negative: bool, length: int
) -> Conditioning:
    """T5's states [B, L, E], and which of them are the caption's [B, L], 1 or 0."""
    options = {"device": device, "clean_caption": cleans_captions(), "max_sequence_length": length}
    states = pipeline.encode_prompt(prompts, is_negative, **options)
    text_BLE, mask_BL = states[2:4] if is_negative else states[:2]
    return Conditioning({"text": text_BLE, "text_mask": mask_BL.to(text_BLE.dtype)})


FAMILY = TransformerFamily(
    NAME="PixArt: a PixArtAlphaPipeline or PixArtSigmaPipeline with a PixArtTransformer2DModel",
    NETWORK=PrunablePixArtTransformer2DModel,
    PIPELINES=tuple(TOKENS),
    DENOISER=PixArtDenoiser,
    encoded=encoded,
    max_tokens=TOKENS,
    own_options=lambda scale: {"use_resolution_binning": False},
    is_flow=False,
    single_file=(
        ("y_embedder.y_proj.fc1.weight", "blocks.0.attn.qkv.bias"),
        ("pos_embed.proj.weight", "caption_projection.linear_1.weight"),
    ),
)
