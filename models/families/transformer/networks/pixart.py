"""The prunable transformer of PixArt-α and PixArt-Σ, which attends to the text by cross-attention."""

from typing import Any

from diffusers import ModelMixin, PixArtTransformer2DModel  # noqa: F401  (diffusers looks for ModelMixin in this namespace)

from slimstep.models.families.prunable import class_file
from slimstep.models.families.transformer.network import PrunableTransformer


class PrunablePixArtTransformer2DModel(PrunableTransformer, PixArtTransformer2DModel):
    """A PixArtTransformer2DModel with an architecture table and block masks (PrunableTransformer)."""

    STOCK, CLASS_FILE = PixArtTransformer2DModel, class_file(__file__, "transformer")
    LISTS = {"transformer_blocks": "num_layers"}
    STREAMS = ("hidden_states",)
    SUBLAYERS = {"transformer_blocks": {name: {name: ("hidden_states",)} for name in ("attn1", "attn2", "ff")}}
    _repeated_blocks = ["BasicTransformerBlock", "MaskedBasicTransformerBlock"]

    def make_prunable(self, *table) -> None:
        # diffusers takes them from sample_size, which changes with the resolution that is trained.
        self.register_to_config(use_additional_conditions=self.use_additional_conditions,
                                interpolation_scale=self.pos_embed.interpolation_scale)  # fmt: skip
        super().make_prunable(*table)

    def size_fields(self) -> dict[str, Any]:
        """The size that the positions were made for; others are interpolated from it."""
        return {"sample_size": self.pos_embed.height * self.config.patch_size}
