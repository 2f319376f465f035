"""What prunable UNets share: their blocks, what is left of a removed one, and the way their class travels.

A block is a ResNet, an attention or, where an attention holds several layers, one of these. `PrunableUNet` is mixed
into diffusers' own classes (unet2d/network.py, ddpm/network.py). One file travels with exports: that of the class with
this one, prunable.py and architecture.py in the place of their imports, so that it holds all that the class needs and
imports nothing but torch and diffusers.

Axes: B batch, C channels, H and W height and width. Some features are [B, C, H, W], some tokens.
"""

from collections.abc import Sequence
from itertools import takewhile

import torch
from diffusers import ModelMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn

from slimstep.models.architecture import Levels, unet_levels
from slimstep.models.families.merged import MergedAttention
from slimstep.models.families.prunable import Prunable, RunningMask


class PrunableUNet(Prunable):
    """Mixed into a UNet of diffusers, before it.

    Beside what `Prunable` asks for the class says `BLOCK_CLASSES`, the modules that are blocks. `depths` may also name
    an innermost level as a whole (`down_blocks.3: 0`): both its blocks, the mid block, and the resampling into it and
    out of it go.
    bypass: what is left of a removed ResNet whose channels change: 'shortcut' keeps its 1×1 convolution; 'drop_skip'
        (up path, where the incoming features have the output's width) passes them on and drops the skip connection. One
        rule for all blocks ('drop_skip' then means wherever it is possible), or {block: rule} for some.
    auto_map: so that diffusers' AutoModel finds the class's file beside the weights.
    Every other removed block is the identity. ResNets that change channels cannot be copied, nor can blocks that divide
    the sum of input and branch (`resnet_out_scale_factor`), which no weights make the identity.
    """

    INPUT = "sample"
    BLOCK_CLASSES: tuple[type[nn.Module], ...]

    # ---- its blocks ----

    def find_blocks(self) -> dict[str, nn.Module]:
        return find_blocks(self, self.BLOCK_CLASSES)

    def kind_of(self, module: nn.Module) -> str:
        return "resnet" if isinstance(module, ResnetBlock2D) else "attention"

    def rules_possible_at(self, block: str, module: nn.Module) -> tuple[str, ...]:
        return skip_rule_choices(self, block) if changes_channels(module) else ()

    def can_be_copied(self, block: str) -> bool:
        return block not in self.skip_rule_choices and not divides(self.get_submodule(block))

    def remove_block(self, path: str) -> None:
        self.set_submodule(path, Removed(self.get_submodule(path), self.skip_rules.get(path, "identity")))

    def masked_class(self, module: nn.Module) -> type[nn.Module]:
        return MASKED[type(module)]

    def zero_init(self, block: nn.Module) -> nn.Module:
        return silence(block)

    def self_attentions_of(self, path: str) -> list[nn.Module]:
        block = self.get_submodule(path)
        layers = getattr(block, "transformer_blocks", [block])
        of_tokens = [layer for layer in layers if isinstance(layer, BasicTransformerBlock)]
        return [layer.attn1 for layer in of_tokens
                if isinstance(layer.attn1, Attention) and not layer.only_cross_attention]  # fmt: skip

    def settle_merges(self) -> None:
        for module in (module for module in self.modules() if isinstance(module, MaskedTransformer)):
            module.merged = tuple(inner for inner in module.modules() if isinstance(inner, MergedAttention))

    def removable_levels(self) -> Levels:
        """The levels that can go as a whole, the innermost first, as far out as the width stays the same."""
        widths = self.config.block_out_channels
        same = takewhile(lambda i: widths[i] == widths[i - 1], reversed(range(1, len(widths))))
        parts = unet_levels(len(widths))
        return {level: parts[level] for level in (f"down_blocks.{i}" for i in same)}

    def remove_level(self, level: str) -> None:
        """Take the innermost level out; the levels that stay keep their paths, hence pop, which does not renumber."""
        self.down_blocks._modules.pop(level.split(".")[1])
        self.up_blocks._modules.pop(next(iter(self.up_blocks._modules)))
        self.down_blocks[-1].downsamplers = None
        self.mid_block = None


# ---- the parts of a running UNet ----


class MaskedBlock:
    """Mixed into the class of a kept block: runs its copies too, and lets samples skip them where the mask says so."""

    running: RunningMask
    column: int
    rule: str
    copies: nn.ModuleList | tuple

    def forward(self, x: Tensor, *args, **kwargs):
        output = super().forward(x, *args, **kwargs)
        for module in self.copies:
            output = module(output[0] if isinstance(output, tuple) else output, *args, **kwargs)
        if self.running.mask_BN is None:
            return output
        y = output[0] if isinstance(output, tuple) else output
        # where, not a product: 0 * inf in a closed branch would still be nan.
        y = torch.where(open_rows(self, y), y, skipped(self, self.rule, x))
        return (y,) if isinstance(output, tuple) else y


def open_rows(block: nn.Module, y: Tensor) -> Tensor:
    """Whether a block is open in each row of features y, shaped to meet their axes; a video's frames are as many rows
    of one sample."""
    open_B = block.running.mask_BN[:, block.column]
    if len(open_B) != len(y):
        open_B = open_B.repeat_interleave(len(y) // len(open_B))
    return open_B.view(-1, *[1] * (y.ndim - 1))


class MaskedResnet(MaskedBlock, ResnetBlock2D):
    pass


class MaskedTransformer(MaskedBlock, Transformer2DModel):
    """It gives the height and width of its input to the self-attentions that merge tokens, its own and its copies'."""

    merged: Sequence[MergedAttention] = ()

    def forward(self, x: Tensor, *args, **kwargs):
        for attention in self.merged:
            attention.grid = tuple(x.shape[-2:])
        return super().forward(x, *args, **kwargs)


class MaskedLayer(MaskedBlock, BasicTransformerBlock):
    pass


class MaskedAttention(MaskedBlock, Attention):
    pass


MASKED = {
    ResnetBlock2D: MaskedResnet, Transformer2DModel: MaskedTransformer, BasicTransformerBlock: MaskedLayer,
    Attention: MaskedAttention,
}  # fmt: skip


class Removed(nn.Module):
    """What is left of a removed block: what its skip rule gives."""

    def __init__(self, removed: nn.Module, rule: str):
        super().__init__()
        self.rule = rule
        self.is_transformer = isinstance(removed, Transformer2DModel | TransformerSpatioTemporalModel)
        self.is_attention = isinstance(removed, Attention)
        self.out_channels = getattr(removed, "out_channels", None)
        if rule == "shortcut":
            self.conv_shortcut = removed.conv_shortcut

    def forward(self, x: Tensor, *args, **kwargs):
        y = skipped(self, self.rule, x)
        if self.is_attention:  # it leaves features channels-last, and convolutions round otherwise on others
            y = y.contiguous(memory_format=torch.channels_last)
        return (y,) if self.is_transformer else y


def skipped(module: nn.Module, rule: str, x: Tensor) -> Tensor:
    """What a removed or closed block gives for the features x (on the way up: features and skip, concatenated)."""
    if rule == "shortcut":
        return module.conv_shortcut(x)
    return x[:, : module.out_channels] if rule == "drop_skip" else x


# ---- what a stock UNet offers ----


def find_blocks(unet: ModelMixin, classes: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """{path: module} of all blocks, of these classes, in order of execution; a transformer's layers follow it."""
    sides = [(f"down_blocks.{i}", side) for i, side in enumerate(unet.down_blocks)]
    sides += [("mid_block", unet.mid_block), *((f"up_blocks.{i}", side) for i, side in enumerate(unet.up_blocks))]
    blocks = {}
    for name, side in sides:
        attentions = list(getattr(side, "attentions", None) or ())
        for i, resnet in enumerate(getattr(side, "resnets", None) or ()):
            if type(resnet) in classes:
                blocks[f"{name}.resnets.{i}"] = resnet
            if i < len(attentions) and type(attentions[i]) in classes:
                block, layers = f"{name}.attentions.{i}", getattr(attentions[i], "transformer_blocks", ())
                blocks[block] = attentions[i]
                blocks |= {f"{block}.transformer_blocks.{k}": m for k, m in enumerate(layers) if len(layers) > 1}
    return blocks


def changes_channels(module: nn.Module) -> bool:
    return isinstance(module, ResnetBlock2D) and module.in_channels != module.out_channels


def divides(module: nn.Module) -> bool:
    """Whether a block gives its input and its branch, added up, over a factor."""
    names = {ResnetBlock2D: "output_scale_factor", Attention: "rescale_output_factor"}
    return any(isinstance(module, kind) and getattr(module, name) != 1 for kind, name in names.items())


def skip_rule_choices(unet: ModelMixin, block: str) -> tuple[str, ...]:
    """The rules possible at a ResNet that changes channels."""
    side, level, _, index = block.split(".")
    widths, level = list(reversed(unet.config.block_out_channels)), int(level)
    keeps_width = side == "up_blocks" and (int(index) > 0 or level == 0 or widths[level] == widths[level - 1])
    return ("shortcut", "drop_skip") if keeps_width else ("shortcut",)


def silence(block: nn.Module) -> nn.Module:
    """Zero the last layer of each residual branch: the block becomes the identity."""
    if isinstance(block, ResnetBlock2D | TemporalResnetBlock):
        last = [block.conv2]
    elif isinstance(block, Transformer2DModel | TransformerSpatioTemporalModel):
        last = [block.proj_out]
    elif isinstance(block, Attention):
        last = [block.to_out[0]]
    else:
        last = [a.to_out[0] for a in (block.attn1, block.attn2) if isinstance(a, Attention)]
        last += [m for m in getattr(block.ff, "net", ()) if isinstance(m, nn.Linear)][-1:]
    for parameter in (p for layer in last for p in layer.parameters()):
        nn.init.zeros_(parameter)
    return block
