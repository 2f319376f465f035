"""The prunable transformer of FLUX.1: its first blocks hold image and text apart, the others take them as one."""

from diffusers import FluxTransformer2DModel, ModelMixin  # noqa: F401  (diffusers looks for ModelMixin in this namespace)

from slimstep.models.families.prunable import class_file
from slimstep.models.families.transformer.network import PrunableTransformer


class PrunableFluxTransformer2DModel(PrunableTransformer, FluxTransformer2DModel):
    """A FluxTransformer2DModel with an architecture table and block masks (PrunableTransformer)."""

    STOCK, CLASS_FILE = FluxTransformer2DModel, class_file(__file__, "transformer")
    LISTS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
    STREAMS = ("encoder_hidden_states", "hidden_states")
    SUBLAYERS = {
        "transformer_blocks": {
            "attn": {"attn": ("hidden_states", "encoder_hidden_states")},
            "ff": {"ff": ("hidden_states",), "ff_context": ("hidden_states",)},
        },
        # Both at once, and one output layer for both, which stays as wide where one of them is removed.
        "single_transformer_blocks": {"proj_mlp": {"proj_mlp": None}, "attn": {"attn": ("hidden_states",)}},
    }
    _repeated_blocks = ["FluxTransformerBlock", "FluxSingleTransformerBlock", "MaskedFluxTransformerBlock",
                        "MaskedFluxSingleTransformerBlock"]  # fmt: skip
