"""The prunable transformer of Wan, which attends to the video, and to the text by cross-attention."""

from diffusers import ModelMixin, WanTransformer3DModel  # noqa: F401  (diffusers looks for ModelMixin in this namespace)
from torch import nn

from slimstep.models.families.prunable import class_file
from slimstep.models.families.transformer.network import PrunableTransformer


class PrunableWanTransformer3DModel(PrunableTransformer, WanTransformer3DModel):
    """A WanTransformer3DModel with an architecture table and block masks (PrunableTransformer).

    Its list of blocks has the name `blocks`, as in diffusers: `all_blocks` says the paths.
    """

    STOCK, CLASS_FILE = WanTransformer3DModel, class_file(__file__, "transformer")
    LISTS = {"blocks": "num_layers"}
    STREAMS = ("hidden_states",)
    SUBLAYERS = {"blocks": {name: {name: ("hidden_states",)} for name in ("attn1", "attn2", "ffn")}}
    _repeated_blocks = ["WanTransformerBlock", "MaskedWanTransformerBlock"]

    def make_prunable(self, *table) -> None:
        if self.config.get("sample_frames") is None:  # its pipeline's, which the configuration does not say
            self.register_to_config(sample_size=[60, 104], sample_frames=81, temporal_compression_ratio=4)
        super().make_prunable(*table)

    @property
    def blocks(self) -> nn.ModuleList:
        return self._modules["blocks"]
