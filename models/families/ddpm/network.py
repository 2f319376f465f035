"""The prunable UNet of unconditional DDPMs: diffusers' UNet2DModel (families/unet.py).

Its blocks are ResNets and self-attentions (Attention).
"""

from collections.abc import Mapping

from diffusers import ModelMixin, UNet2DModel  # noqa: F401  (diffusers looks for ModelMixin in this namespace)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from slimstep.models.architecture import BlockSpec, Levels
from slimstep.models.families.prunable import class_file
from slimstep.models.families.unet import PrunableUNet

PLAIN = {"DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"}


class PrunableUNet2DModel(PrunableUNet, UNet2DModel):
    """A UNet2DModel with an architecture table and block masks; `PrunableUNet` says what these are."""

    STOCK, BLOCK_CLASSES, CLASS_FILE = UNet2DModel, (ResnetBlock2D, Attention), class_file(__file__)

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

    def removable_levels(self) -> Levels:
        """None where levels hand a picture on beside their features, as those of NCSN++ do."""
        types = {*self.config.down_block_types, *self.config.up_block_types}
        return super().removable_levels() if types <= PLAIN else {}
