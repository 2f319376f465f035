"""The prunable UNet of Stable Diffusion, SDXL and DeepFloyd IF: diffusers' UNet2DConditionModel (families/unet.py).

Its blocks are ResNets, cross-attentions (Transformer2DModel) and, where a cross-attention holds several, its layers;
in DeepFloyd IF attentions to picture and text at once (Attention). ResNets that resample are none.
"""

from collections.abc import Mapping

from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401  (diffusers looks for ModelMixin in this namespace)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from slimstep.models.architecture import BlockSpec
from slimstep.models.families.prunable import class_file
from slimstep.models.families.unet import PrunableUNet


class PrunableUNet2DConditionModel(PrunableUNet, UNet2DConditionModel):
    """A UNet2DConditionModel with an architecture table and block masks; `PrunableUNet` says what these are."""

    STOCK, CLASS_FILE = UNet2DConditionModel, class_file(__file__)
    BLOCK_CLASSES = (ResnetBlock2D, Transformer2DModel, Attention)
    _repeated_blocks = ["BasicTransformerBlock", "MaskedLayer"]

    @register_to_config
    def __init__(
        self,
        depths: Mapping[str, int | Mapping | BlockSpec] | None = None,
        bypass: str | Mapping[str, str] = "shortcut",
        auto_map: Mapping[str, str] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.make_prunable(depths, bypass)

    def remove_level(self, level: str) -> None:
        super().remove_level(level)
        self.num_upsamplers -= 1
