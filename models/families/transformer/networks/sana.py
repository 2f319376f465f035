"""The prunable transformer of Sana, of linear attention to the image and cross-attention to the text."""

from typing import Any

from diffusers import ModelMixin, SanaTransformer2DModel  # noqa: F401  (diffusers looks for ModelMixin in this namespace)

from slimstep.models.families.prunable import class_file
from slimstep.models.families.transformer.network import PrunableTransformer


class PrunableSanaTransformer2DModel(PrunableTransformer, SanaTransformer2DModel):
    """A SanaTransformer2DModel with an architecture table and block masks (PrunableTransformer)."""

    STOCK, CLASS_FILE = SanaTransformer2DModel, class_file(__file__, "transformer")
    LISTS = {"transformer_blocks": "num_layers"}
    STREAMS = ("hidden_states",)
    SUBLAYERS = {"transformer_blocks": {name: {name: ("hidden_states",)} for name in ("attn1", "attn2", "ff")}}
    _repeated_blocks = ["SanaTransformerBlock", "MaskedSanaTransformerBlock"]

    def size_fields(self) -> dict[str, Any]:
        """The size that the positions were made for, by which its pipeline also chooses its sizes of images."""
        return {"sample_size": self.patch_embed.height * self.config.patch_size}
