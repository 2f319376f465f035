"""The prunable transformer of CogVideoX, whose blocks attend to video and text together."""

from diffusers import CogVideoXTransformer3DModel, ModelMixin  # noqa: F401  (diffusers looks for ModelMixin in this namespace)

from slimstep.models.families.prunable import class_file
from slimstep.models.families.transformer.network import PrunableTransformer


class PrunableCogVideoXTransformer3DModel(PrunableTransformer, CogVideoXTransformer3DModel):
    """A CogVideoXTransformer3DModel with an architecture table and block masks (PrunableTransformer).

    `sample_size` in its configuration is what it draws. `sample_height` and `sample_width` stay what it was made for:
    its rotary positions are cut from those.
    """

    STOCK, CLASS_FILE = CogVideoXTransformer3DModel, class_file(__file__, "transformer")
    LISTS = {"transformer_blocks": "num_layers"}
    STREAMS = ("hidden_states", "encoder_hidden_states")
    SUBLAYERS = {"transformer_blocks": {
        "attn1": {"attn1": ("hidden_states", "encoder_hidden_states")},
        "ff": {"ff": ("hidden_states",)},
    }}  # fmt: skip
    _repeated_blocks = ["CogVideoXBlock", "MaskedCogVideoXBlock"]

    def make_prunable(self, *table) -> None:
        if self.config.get("sample_size") is None:
            self.register_to_config(sample_size=[self.config.sample_height, self.config.sample_width])
        super().make_prunable(*table)
