"""Which pruned UNets diffusers' UNet2DConditionModel can express (families/stock.py)."""

from collections.abc import Sequence

from diffusers import UNet2DConditionModel

from slimstep.models.families.stock import StockEquivalent, StockPlan, count_layers, public_fields, simplest
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel

PER_LEVEL = ("attention_head_dim", "num_attention_heads", "cross_attention_dim", "only_cross_attention")


def stock_config(unet: UNet2DConditionModel) -> StockEquivalent:
    """The stock configuration with the pruned UNet's output, or the blocks that have no place in one."""
    is_prunable = isinstance(unet, PrunableUNet2DConditionModel)
    return UNet2DConditionPlan(unet).equivalent if is_prunable else StockEquivalent(public_fields(unet), ())


def to_stock(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The stock UNet with the pruned UNet's output: copies of its weights, renumbered; ValueError if there is none."""
    return UNet2DConditionPlan(unet).network()


class UNet2DConditionPlan(StockPlan):
    """Levels may have different numbers of layers, and transformers in them; of the middle, one ResNet may stay."""

    WITHOUT_ATTENTION = {
        "CrossAttnDownBlock2D": "DownBlock2D", "SimpleCrossAttnDownBlock2D": "ResnetDownsampleBlock2D",
        "CrossAttnUpBlock2D": "UpBlock2D", "SimpleCrossAttnUpBlock2D": "ResnetUpsampleBlock2D",
    }  # fmt: skip

    def mid_fields(self) -> dict:
        """All of the mid block, one ResNet of it, or none."""
        blocks, kept = self.middle()
        if not kept:
            return {"mid_block_type": None}
        has_one = kept != blocks and len(kept) == 1 and self.unet.kinds[kept[0]] == "resnet"
        # A stock mid block without attention has activations before its time projections, always.
        if has_one and not self.unet.config.get("resnet_skip_time_act"):
            self.paths[kept[0]] = "mid_block.resnets.0"
            return {"mid_block_type": "UNetMidBlock2D"}
        for block in (s for s in blocks if s not in kept):
            self.obstruct(block, "is removed; of a stock mid block all stays, or one ResNet, or nothing")
        return {"mid_block_type": self.unet.config.mid_block_type}

    def level_fields(self) -> dict:
        fields = {name: self.unet.config[name] for name in PER_LEVEL if name in self.unet.config}
        fields = {k: list(v[: self.num_levels]) for k, v in fields.items() if isinstance(v, Sequence)}
        layers = {"layers_per_block": simplest([len(level.kept) for level in self.down])}
        return super().level_fields() | fields | layers | self.transformer_fields()

    def transformer_fields(self) -> dict:
        """transformer_layers_per_block, and its mirror image where the way up is not the way down reversed."""
        default = self.unet.config.transformer_layers_per_block
        defaults = [default] * self.num_levels if isinstance(default, int) else list(default[: self.num_levels])
        down = [simplest(level.transformer_layers) or d for level, d in zip(self.down, defaults, strict=True)]
        if self.mid["mid_block_type"] == "UNetMidBlock2DCrossAttn":
            layers = count_layers(self.unet, "mid_block.attentions.0")
            if not self.down[-1].transformer_layers:
                down[-1] = layers
            elif layers != self.down[-1].transformer_layers[0]:
                found_here = f"{self.down[-1].path}'s first has {self.down[-1].transformer_layers[0]}"
                self.obstruct(
                    "mid_block.attentions.0", f"has {layers} layers where {found_here}; a stock UNet ties the two"
                )
        up = [simplest(level.transformer_layers) or d for level, d in zip(self.up, reversed(down), strict=True)]
        mirrored = up == down[::-1] and all(isinstance(d, int) for d in up)
        fields = {"transformer_layers_per_block": simplest(down) if isinstance(default, int) else down}
        return fields | {"reverse_transformer_layers_per_block": None if mirrored else up}
