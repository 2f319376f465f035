"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel in a StableDiffusion3Pipeline.

Its blocks attend to image and text together, and each gives both on, but for the last, which gives on the image alone.
Where the last is removed the new last block gives on the image alone, too.

Axes: B batch, L tokens, E text width, P pooled width, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SD3Transformer2DModel
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.families.transformer.denoiser import TransformerDenoiser
from slimstep.models.families.transformer.family import TransformerFamily
from slimstep.models.families.transformer.network import PrunableTransformer

T5_TOKENS = 256  # the pipeline's default, also where there is no T5 and its states are zero


class PrunableSD3Transformer2DModel(PrunableTransformer, SD3Transformer2DModel):
    """An SD3Transformer2DModel with an architecture table and block masks (network.py)."""

    STOCK, LISTS = SD3Transformer2DModel, {"transformer_blocks": "num_layers"}
    STREAMS = ("encoder_hidden_states", "hidden_states")
    _repeated_blocks = ["JointTransformerBlock", "MaskedJointTransformerBlock"]

    def can_be_copied(self, block: str) -> bool:
        return block != self.blocks[-1]  # it gives no text that a copy could take

    def settle_streams(self) -> None:
        running = [*self.transformer_blocks.children()]
        if running:
            last = running[-1]
            give_no_text([last, *getattr(last, "copies", ())][-1])

    def stock_fields(self) -> dict[str, Any]:
        dual = {f"transformer_blocks.{i}" for i in self.config.dual_attention_layers}
        running = [path.split(".copies.")[0] for path in self.running_paths("transformer_blocks")]
        return {"dual_attention_layers": [k for k, block in enumerate(running) if block in dual]}

    def stock_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scale and shift of the last block's text, in the order of the class that stock networks have there."""
        kept = dict(weights)
        for path in [*self.running_paths("transformer_blocks")][-1:]:
            for name in (f"{path}.norm1_context.linear.{part}" for part in ("weight", "bias")):
                if len(kept[name]) == 6 * self.inner_dim:
                    kept[name] = last_text_modulation(kept[name])
        return kept


def last_text_modulation(rows: Tensor) -> Tensor:
    """Of six modulations of a block's text, one above the other, those that the last block has, in its order."""
    shift, scale, *_ = rows.chunk(6)
    return torch.cat([scale, shift])


class NormAlone(AdaLayerNormZero):
    """The normed text, without the gates of what is no longer computed."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return super().forward(x, emb=emb)[0]


def give_no_text(block: nn.Module) -> None:
    """Makes a block the last one. What it gives of the image stays the same to the bit, hence the norm it has."""
    if block.context_pre_only:
        return
    block.context_pre_only = block.attn.context_pre_only = True
    block.norm2_context = block.ff_context = block.attn.to_add_out = None
    block.norm1_context.__class__ = NormAlone


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
    pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device, is_negative: bool
) -> Conditioning:
    """Text states of both CLIPs and T5's behind one another [B, L, E], and the pooled ones [B, P]."""
    options = {"device": device, "do_classifier_free_guidance": is_negative, "num_images_per_prompt": 1}
    states = pipeline.encode_prompt(prompts, None, None, **options)
    text_BLE, pooled_BP = (states[1], states[3]) if is_negative else (states[0], states[2])
    return Conditioning({"text": text_BLE, "pooled": pooled_BP})


def num_tokens(pipeline: DiffusionPipeline) -> int:
    return pipeline.tokenizer_max_length + T5_TOKENS


FAMILY = TransformerFamily(
    NAME="Stable Diffusion 3: a StableDiffusion3Pipeline with an SD3Transformer2DModel",
    NETWORK=PrunableSD3Transformer2DModel,
    PIPELINES=("StableDiffusion3Pipeline",),
    DENOISER=SD3Denoiser,
    encoded=encoded,
    num_tokens=num_tokens,
)
