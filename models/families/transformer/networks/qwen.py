"""The prunable transformer of Qwen-Image, whose blocks hold image and text apart."""

from diffusers import ModelMixin, QwenImageTransformer2DModel  # noqa: F401  (diffusers looks for ModelMixin in this namespace)

from slimstep.models.families.prunable import class_file
from slimstep.models.families.transformer.network import PrunableTransformer


class PrunableQwenImageTransformer2DModel(PrunableTransformer, QwenImageTransformer2DModel):
    """A QwenImageTransformer2DModel with an architecture table and block masks (PrunableTransformer)."""

    STOCK, CLASS_FILE = QwenImageTransformer2DModel, class_file(__file__, "transformer")
    LISTS = {"transformer_blocks": "num_layers"}
    STREAMS = ("encoder_hidden_states", "hidden_states")
    SUBLAYERS = {"transformer_blocks": {
        "attn": {"attn": ("hidden_states", "encoder_hidden_states")},
        "img_mlp": {"img_mlp": ("hidden_states",), "txt_mlp": ("hidden_states",)},
    }}  # fmt: skip
    _repeated_blocks = ["QwenImageTransformerBlock", "MaskedQwenImageTransformerBlock"]
