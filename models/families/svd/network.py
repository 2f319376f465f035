"""The prunable UNet of Stable Video Diffusion: diffusers' UNetSpatioTemporalConditionModel (families/unet.py).

Time is apart from space: a layer's ResNet is two blocks, `spatial_res_block` and `temporal_res_block`, and so are the
layers of its transformer, `transformer_blocks.k` and `temporal_transformer_blocks.k`, within that as a whole.
A temporal block's features are blended with the spatial ones that it began with; without it there is nothing to blend,
and the spatial ones go on as they are.

Axes: B batch, F frames, C channels, H and W height and width, L tokens of a frame, E channels of tokens. Features of
frames are [B·F, …], the frames of a sample behind one another.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin, UNetSpatioTemporalConditionModel  # noqa: F401  (diffusers looks for ModelMixin here)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.resnet import AlphaBlender, ResnetBlock2D, SpatioTemporalResBlock, TemporalResnetBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn

from slimstep.models.architecture import BlockSpec
from slimstep.models.families.prunable import class_file
from slimstep.models.families.unet import (
    MaskedBlock,
    MaskedLayer,
    MaskedResnet,
    PrunableUNet,
    changes_channels,
    open_rows,
    silence,
    skip_rule_choices,
)

TEMPORAL = (TemporalResnetBlock, TemporalBasicTransformerBlock)


class PrunableUNetSpatioTemporalConditionModel(PrunableUNet, UNetSpatioTemporalConditionModel):
    """A UNetSpatioTemporalConditionModel with an architecture table and block masks; `PrunableUNet` says what these
    are."""

    STOCK, CLASS_FILE = UNetSpatioTemporalConditionModel, class_file(__file__)

    @register_to_config
    def __init__(
        self,
        depths: Mapping[str, int | Mapping | BlockSpec] | None = None,
        bypass: str | Mapping[str, str] = "shortcut",
        auto_map: Mapping[str, str] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        for module in self.modules():
            if type(module) in DIVIDED:
                module.__class__ = DIVIDED[type(module)]
            elif isinstance(module, AlphaBlender) and self.conv_in.weight.is_meta:
                module.mix_factor = nn.Parameter(module.mix_factor.to("meta"))  # diffusers makes it on the CPU
        self.make_prunable(depths, bypass)

    def find_blocks(self) -> dict[str, nn.Module]:
        sides = [(f"down_blocks.{i}", side) for i, side in enumerate(self.down_blocks)]
        sides += [("mid_block", self.mid_block), *((f"up_blocks.{i}", side) for i, side in enumerate(self.up_blocks))]
        found = {}
        for name, side in sides:
            attentions = list(getattr(side, "attentions", ()))
            for i, resnet in enumerate(side.resnets):
                path = f"{name}.resnets.{i}"
                found |= {
                    f"{path}.{part}": getattr(resnet, part) for part in ("spatial_res_block", "temporal_res_block")
                }
                if i < len(attentions):
                    found |= transformer_blocks(f"{name}.attentions.{i}", attentions[i])
        return found

    def kind_of(self, module: nn.Module) -> str:
        return "resnet" if isinstance(module, ResnetBlock2D | TemporalResnetBlock) else "attention"

    def rules_possible_at(self, block: str, module: nn.Module) -> tuple[str, ...]:
        return skip_rule_choices(self, block.rpartition(".")[0]) if changes_channels(module) else ()

    def remove_block(self, path: str) -> None:
        if isinstance(self.get_submodule(path), TEMPORAL):
            self.remove_time(path)
        else:
            super().remove_block(path)

    def remove_time(self, path: str) -> None:
        """What blends its features with the spatial ones goes along with a temporal block, where no other needs it."""
        self.set_submodule(path, RemovedTime())
        holder = self.get_submodule(path.split(".temporal_")[0])
        if isinstance(holder, SpatioTemporalResBlock):
            del holder.time_mixer
        elif all(isinstance(layer, RemovedTime) for layer in holder.temporal_transformer_blocks):
            del holder.time_mixer, holder.time_pos_embed

    def remove_level(self, level: str) -> None:
        super().remove_level(level)
        self.mid_block, self.num_upsamplers = NoMiddle(), self.num_upsamplers - 1

    def masked_class(self, module: nn.Module) -> type[nn.Module]:
        return MASKED_IN_TIME[type(module)]

    def zero_init(self, block: nn.Module) -> nn.Module:
        if isinstance(block, TemporalBasicTransformerBlock):
            for parameter in block.ff_in.net[-1].parameters():
                nn.init.zeros_(parameter)
        return silence(block)

    def self_attentions_of(self, path: str) -> list[nn.Module]:
        return []  # whose tokens merge: none yet


def transformer_blocks(path: str, transformer: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of a transformer and its layers, each spatial one before its temporal one."""
    layers = zip(transformer.transformer_blocks, transformer.temporal_transformer_blocks, strict=True)
    found = {path: transformer}
    for k, (spatial, temporal) in enumerate(layers):
        found |= {f"{path}.transformer_blocks.{k}": spatial, f"{path}.temporal_transformer_blocks.{k}": temporal}
    return found


# ---- the parts of a running network ----


class DividedResnet(SpatioTemporalResBlock):
    """The stock forward, in which the temporal half may be gone or closed for some samples."""

    def forward(self, x: Tensor, temb: Tensor | None = None, image_only_indicator: Tensor | None = None) -> Tensor:
        x = self.spatial_res_block(x, temb)
        if isinstance(self.temporal_res_block, RemovedTime):
            return x
        frames = image_only_indicator.shape[-1]
        spatial_BCFHW = x.reshape(-1, frames, *x.shape[1:]).permute(0, 2, 1, 3, 4)
        temb_BFE = None if temb is None else temb.reshape(-1, frames, temb.shape[-1])
        temporal_BCFHW = self.temporal_res_block(spatial_BCFHW, temb_BFE)
        blend = {"x_spatial": spatial_BCFHW, "x_temporal": temporal_BCFHW}
        y_BCFHW = self.time_mixer(**blend, image_only_indicator=image_only_indicator)
        y = y_BCFHW.permute(0, 2, 1, 3, 4).reshape(x.shape)
        return chosen(self.temporal_res_block, y, x)


class DividedTransformer(TransformerSpatioTemporalModel):
    """The stock forward, in which temporal layers may be gone or closed for some samples."""

    def forward(
        self,
        x: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image_only_indicator: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        rows, _, height, width = x.shape
        frames, text = image_only_indicator.shape[-1], encoder_hidden_states
        # Every place of a sample's frames sees the text of its first frame.
        text_of_places = text.reshape(-1, frames, *text.shape[1:])[:, :1].expand(-1, height * width, -1, -1)
        text_of_places = text_of_places.reshape(-1, *text.shape[1:])
        h_LE = self.norm(x).permute(0, 2, 3, 1).reshape(rows, height * width, -1)
        h_LE = self.proj_in(h_LE)
        place_in_time = None
        if hasattr(self, "time_pos_embed"):
            numbers = torch.arange(frames, device=x.device).repeat(rows // frames)
            place_in_time = self.time_pos_embed(self.time_proj(numbers).to(h_LE.dtype))[:, None, :]
        for spatial, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            h_LE = self.run_block(spatial, h_LE, None, text, None)
            if isinstance(temporal, RemovedTime):
                continue
            moved_LE = self.run_block(temporal, h_LE + place_in_time, frames, text_of_places)
            blend = {"x_spatial": h_LE, "x_temporal": moved_LE}
            h_LE = chosen(temporal, self.time_mixer(**blend, image_only_indicator=image_only_indicator), h_LE)
        h_LE = self.proj_out(h_LE)
        return (h_LE.reshape(rows, height, width, -1).permute(0, 3, 1, 2).contiguous() + x,)

    def run_block(self, block: nn.Module, *inputs: Any) -> Tensor:
        """The stock forward runs spatial layers again in the backward, but keeps all of the temporal ones."""
        again = torch.is_grad_enabled() and self.gradient_checkpointing
        return self._gradient_checkpointing_func(block, *inputs) if again else block(*inputs)


def chosen(temporal: nn.Module, blended: Tensor, spatial: Tensor) -> Tensor:
    """The blended features, but the spatial ones of samples for which a temporal block is closed."""
    running = getattr(temporal, "running", None)
    if running is None or running.mask_BN is None:
        return blended
    return torch.where(open_rows(temporal, blended), blended, spatial)


class MaskedTime:
    """Mixed into the class of a kept temporal block: runs its copies too. What it is blended with, and whether it is,
    is said where it is called."""

    copies: nn.ModuleList | tuple

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        x = super().forward(x, *args, **kwargs)
        for module in self.copies:
            x = module(x, *args, **kwargs)
        return x


class MaskedTemporalResnet(MaskedTime, TemporalResnetBlock):
    pass


class MaskedTemporalLayer(MaskedTime, TemporalBasicTransformerBlock):
    pass


class MaskedDividedTransformer(MaskedBlock, DividedTransformer):
    pass


class RemovedTime(nn.Module):
    """What is left of a temporal block: nothing, which is never called."""


class NoMiddle(nn.Module):
    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


DIVIDED = {SpatioTemporalResBlock: DividedResnet, TransformerSpatioTemporalModel: DividedTransformer}
MASKED_IN_TIME = {
    ResnetBlock2D: MaskedResnet, BasicTransformerBlock: MaskedLayer, DividedTransformer: MaskedDividedTransformer,
    TemporalResnetBlock: MaskedTemporalResnet, TemporalBasicTransformerBlock: MaskedTemporalLayer,
}  # fmt: skip
