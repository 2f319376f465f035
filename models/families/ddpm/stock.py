"""Which pruned UNets diffusers' UNet2DModel can express (families/stock.py)."""

from diffusers import UNet2DModel

from slimstep.models.families.ddpm.network import PrunableUNet2DModel
from slimstep.models.families.stock import StockEquivalent, StockPlan, public_fields


def stock_config(unet: UNet2DModel) -> StockEquivalent:
    """The stock configuration with the pruned UNet's output, or the blocks that have no place in one."""
    is_prunable = isinstance(unet, PrunableUNet2DModel)
    return UNet2DPlan(unet).equivalent if is_prunable else StockEquivalent(public_fields(unet), ())


def to_stock(unet: UNet2DModel) -> UNet2DModel:
    """The stock UNet with the pruned UNet's output: copies of its weights, renumbered; ValueError if there is none."""
    return UNet2DPlan(unet).network()


class UNet2DPlan(StockPlan):
    """All levels have as many layers; the middle is whole, without its attention, or gone."""

    WITHOUT_ATTENTION = {"AttnDownBlock2D": "DownBlock2D", "AttnUpBlock2D": "UpBlock2D"}

    def mid_fields(self) -> dict:
        blocks, kept = self.middle()
        fields = {"mid_block_type": self.unet.config.mid_block_type if kept else None}
        if kept and kept == [block for block in blocks if self.unet.kinds[block] == "resnet"]:
            return fields | {"add_attention": False}
        for block in (s for s in blocks if kept and s not in kept):
            self.obstruct(block, "is removed; of a stock mid block all stays, or its ResNets, or nothing")
        return fields

    def level_fields(self) -> dict:
        layers, config = len(self.down[0].kept), self.unet.config
        for level in self.down:
            if len(level.kept) != layers:
                numbers = f"keeps {len(level.kept)} layers where {self.down[0].path} keeps {layers}"
                self.obstruct(level.path, f"{numbers}; those of a stock UNet2DModel have one number")
        for level in (*self.down, *self.up):
            # The types without attention resample by a convolution, always.
            if level.block_type != level.own_type and "resnet" in (config.downsample_type, config.upsample_type):
                self.obstruct(level.path, "has no attention left, without which it would resample in another way")
        return super().level_fields() | {"layers_per_block": layers}
