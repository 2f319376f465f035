"""The prunable transformer of Stable Diffusion 3 and 3.5.

Its blocks attend to image and text together, and each gives both on, but for the last, which gives on the image alone.
Where the last is removed the new last block gives on the image alone, too.
"""

from typing import Any

import torch
from diffusers import ModelMixin, SD3Transformer2DModel  # noqa: F401  (diffusers looks for ModelMixin in this namespace)
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

from slimstep.models.families.prunable import class_file
from slimstep.models.families.transformer.network import PrunableTransformer


class PrunableSD3Transformer2DModel(PrunableTransformer, SD3Transformer2DModel):
    """An SD3Transformer2DModel with an architecture table and block masks (PrunableTransformer)."""

    STOCK, CLASS_FILE = SD3Transformer2DModel, class_file(__file__, "transformer")
    LISTS = {"transformer_blocks": "num_layers"}
    STREAMS = ("encoder_hidden_states", "hidden_states")
    SUBLAYERS = {"transformer_blocks": {
        "attn": {"attn": ("hidden_states", "encoder_hidden_states"), "attn2": ("hidden_states",)},
        "ff": {"ff": ("hidden_states",), "ff_context": ("hidden_states",)},
    }}  # fmt: skip
    _repeated_blocks = ["JointTransformerBlock", "MaskedJointTransformerBlock"]

    def can_be_copied(self, block: str) -> bool:
        last = [path for path in self.all_blocks if path not in self.parents][-1]
        return super().can_be_copied(block) and block != last  # it gives no text that a copy could take

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
