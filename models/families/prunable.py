"""What every prunable UNet shares: blocks that can be removed, copied, and masked for each sample.

An architecture is a table {block: BlockSpec} (models/architecture.py). A block is the module path of a ResNet, of an
attention or, where an attention holds several layers, of one of these. Everything else, names included, is diffusers'
own class, which `PrunableUNet` is mixed into (unet2d/network.py, ddpm/network.py). One file travels with exports: that
of the class with this one and architecture.py in the place of their imports, so that it holds all that the class needs
and imports nothing but torch and diffusers.

Axes: B batch, C channels, H and W height and width, N kept blocks. Some features are [B, C, H, W], some tokens.
"""

import copy
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Self

import torch
from diffusers import ModelMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import no_init_weights
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slimstep.models.architecture import (
    BlockSpec,
    Levels,
    as_architecture,
    as_json,
    canonical,
    holder_of,
    holds,
    instances,
    kept,
    repeats_of,
    unet_levels,
)

OURS = re.compile(r"^from (slimstep\.[\w.]+) import (?:\(.*?\)|[^\n]*)\n", flags=re.M | re.S)


def class_file(file: str) -> tuple[str, str]:
    """The name under which the file of a class travels with exports, and its text: what it imports of ours stands in
    the place of the imports. diffusers keys imported files by their names alone, hence the hash."""
    text, inlined = Path(file).read_text(encoding="utf-8"), set()
    while imported := OURS.search(text):  # an export's own file has none
        name = imported[1]
        inner = "" if name in inlined else Path(find_spec(name).origin).read_text(encoding="utf-8")
        text = text[: imported.start()] + inner + text[imported.end() :]
        inlined.add(name)
    return f"slimstep_unet_{hashlib.sha256(text.encode()).hexdigest()[:10]}", text


class PrunableUNet(ModelMixin):
    """Mixed into a UNet of diffusers, before it: an architecture table and block masks.

    The class says `STOCK`, diffusers' own; `BLOCK_CLASSES`, the modules that are blocks; and `CLASS_FILE`, `class_file`
    of its module. Its constructor takes the following beside the stock arguments, and calls `make_prunable`.
    depths: the architecture, as config.json holds it: {block: repeats}. It may also name an innermost level as a whole
        (`down_blocks.3: 0`): both its blocks, the mid block, and the resampling into it and out of it go.
    bypass: the skip rule, what is left of a removed ResNet whose channels change: 'shortcut' keeps its 1×1 convolution;
        'drop_skip' (up path, where the incoming features have the output's width) passes them on and drops the skip
        connection. One rule for all blocks ('drop_skip' then means wherever it is possible), or {block: rule} for some.
    auto_map: written by save_config, so that diffusers' AutoModel finds this file beside the weights.
    Every other removed block is the identity.
    Raises ValueError for unknown blocks, for copies of a ResNet that changes channels, and for an impossible skip rule.

    architecture: {block: BlockSpec}, in order of execution and without what says nothing.
    blocks: all prunable paths in order of execution, removed ones included. kept_blocks: those that run.
    kinds: {block: 'resnet' or 'attention'}. parents: {layer: the transformer that holds it}; a removed or closed
    transformer takes its layers along. copyable_blocks: those that can run more than once.
    skip_rules: {block: its rule}, for ResNets that change channels; skip_rule_choices: {block: those possible there}.
    levels: the innermost levels that can go as a whole, from the inside out.
    """

    STOCK: type[ModelMixin]
    BLOCK_CLASSES: tuple[type[nn.Module], ...]
    CLASS_FILE: tuple[str, str]

    def make_prunable(
        self, depths: Mapping[str, int | Mapping | BlockSpec] | None, bypass: str | Mapping[str, str]
    ) -> None:
        """The rest of the constructor, once the stock network is built."""
        self.__module__ = self.CLASS_FILE[0]  # a pipeline writes it into model_index.json, and finds the class by it
        modules = find_blocks(self, self.BLOCK_CLASSES)
        self.blocks = tuple(modules)
        self.kinds = {s: "resnet" if isinstance(m, ResnetBlock2D) else "attention" for s, m in modules.items()}
        self.parents = {s: parent for s in modules if (parent := holder_of(s, modules))}
        self.levels = self.removable_levels()
        self.copyable_blocks = tuple(s for s, m in modules.items() if not changes_channels(m))
        self.skip_rule_choices = {s: skip_rule_choices(self, s) for s, m in modules.items() if changes_channels(m)}
        self.skip_rules = self._skip_rule_of_each_block(bypass)
        self.architecture = canonical(as_architecture(depths or {}), self.blocks, self.levels, self.copyable_blocks)
        self.kept_blocks = kept(self.blocks, self.architecture, self.levels)
        written = {"depths": as_json(self.architecture), "bypass": bypass if isinstance(bypass, str) else dict(bypass)}
        self.register_to_config(**written)

        self._running = RunningMask()
        self._remove_and_copy(modules)
        self._watch_mask()

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """diffusers reads a config's fields off the signature, where **kwargs hides the stock ones."""
        keys = set(inspect.signature(input_class.__init__).parameters)
        return keys | set(inspect.signature(input_class.STOCK.__init__).parameters) if "depths" in keys else keys

    # ---- the architecture table ----

    def repeats(self, block: str) -> int:
        """How often a block runs; 0 where it, or what holds it, is removed."""
        return repeats_of(block, self.architecture, self.levels)

    def instances(self, block: str) -> Iterator[str]:
        """The block itself, and, for a layer, its twins in the copies of the transformer that holds it."""
        return instances(block, self.architecture, self.parents.get(block))

    def _skip_rule_of_each_block(self, rule: str | Mapping[str, str]) -> dict[str, str]:
        """{block: rule} for every ResNet that changes channels."""
        if isinstance(rule, str):
            if rule not in ("shortcut", "drop_skip"):
                raise ValueError(f"the skip rule is {rule!r}; choose 'shortcut', 'drop_skip', or {{block: rule}}")
            return {s: rule if rule in choices else "shortcut" for s, choices in self.skip_rule_choices.items()}
        for block, own in rule.items():
            choices = self.skip_rule_choices.get(block, ())
            if own not in choices:
                able = tuple(s for s, rules in self.skip_rule_choices.items() if own in rules)
                raise ValueError(f"skip rule {own!r} is impossible at {block}, which has {choices}; possible at {able}")
        return {block: rule.get(block, "shortcut") for block in self.skip_rule_choices}

    # ---- travelling ----

    def save_config(self, save_directory: str | Path, *args, **kwargs) -> None:
        """As in diffusers; this file goes along, so that whoever saves the network has its class in the folder, too."""
        name, text = self.CLASS_FILE
        self.register_to_config(auto_map={"AutoModel": f"{name}.{type(self).__name__}"})
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{name}.py").write_text(text, encoding="utf-8")
        super().save_config(save_directory, *args, **kwargs)

    # ---- building ----

    @classmethod
    def from_unet(
        cls,
        unet: ModelMixin,
        architecture: Mapping[str, int | Mapping | BlockSpec] | None = None,
        skip_rule: str | Mapping[str, str] | None = None,
        copy_init: str = "zero",
    ) -> Self:
        """A prunable UNet with copies of the weights of any other; where None, `unet`'s own table and rule, if any."""
        table = unet.config.get("depths") if architecture is None else architecture
        return build_from(cls, unet, None, table, skip_rule, copy_init)

    def with_architecture(
        self,
        architecture: Mapping[str, int | Mapping | BlockSpec],
        source: ModelMixin | None = None,
        copy_init: str = "zero",
    ) -> Self:
        """A new UNet with these entries over the present table, and copies of this UNet's weights.

        source: a UNet that holds the removed blocks which this puts back. copy_init: 'zero' zeroes the last layer of
        a fresh copy, so that the network's function does not change; 'same' leaves it equal to the block it copies.
        """
        return build_from(type(self), self, source, {**self.architecture, **architecture}, None, copy_init)

    def _remove_and_copy(self, modules: dict[str, nn.Module]) -> None:
        """Surgery; layers before the transformers that hold them, so that a transformer's copies have its layers."""
        for level in (level for level in self.levels if level in self.architecture):
            self.remove_level(level)
        for block in sorted(self.architecture.keys() & modules.keys(), key=lambda s: s not in self.parents):
            repeats = self.architecture[block].repeats
            if repeats == 0:
                self.set_submodule(block, Removed(modules[block], self.skip_rules.get(block, "identity")))
            else:
                copies = [copy.deepcopy(modules[block]) for _ in range(repeats - 1)]
                modules[block].copies = nn.ModuleList(map(silence, copies))

    def _watch_mask(self) -> None:
        """Give each kept block's module the class that looks at the mask; paths and parameters stay what they are."""
        for column, block in enumerate(self.kept_blocks):
            for module in map(self.get_submodule, self.instances(block)):
                module.__class__ = MASKED[type(module)]
                module.running, module.column = self._running, column
                module.rule = self.skip_rules.get(block, "identity")
                if self.repeats(block) == 1:
                    module.copies = ()

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

    # ---- running ----

    def forward(self, sample: Tensor, *args, block_mask: Tensor | None = None, **kwargs):
        """The stock forward. block_mask: Bool[B, N]; where False, that sample skips that kept block."""
        if block_mask is None:
            return super().forward(sample, *args, **kwargs)
        assert block_mask.shape == (len(sample), len(self.kept_blocks)), (
            f"block mask {tuple(block_mask.shape)} for a batch of {len(sample)} and {len(self.kept_blocks)} kept blocks"
        )
        self._running.mask_BN = block_mask
        try:
            return super().forward(sample, *args, **kwargs)
        finally:
            self._running.mask_BN = None

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable | None = None) -> None:
        """As in diffusers; a block that is run again in the backward pass sees the mask it saw in the forward."""
        super().enable_gradient_checkpointing(CheckpointWithMask(self._running, gradient_checkpointing_func))


# ---- the parts of a running UNet ----


class RunningMask:
    """The block mask of the forward that is running; every block of one UNet reads the same object."""

    mask_BN: Tensor | None = None


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
        open_B = self.running.mask_BN[:, self.column]
        # where, not a product: 0 * inf in a closed branch would still be nan.
        y = torch.where(open_B.view(-1, *[1] * (y.ndim - 1)), y, skipped(self, self.rule, x))
        return (y,) if isinstance(output, tuple) else y


class MaskedResnet(MaskedBlock, ResnetBlock2D):
    pass


class MaskedTransformer(MaskedBlock, Transformer2DModel):
    pass


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
        self.rule, self.is_transformer = rule, isinstance(removed, Transformer2DModel)
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


class CheckpointWithMask:
    """A gradient checkpointing function that takes the block mask along to the recomputation."""

    def __init__(self, running: RunningMask, inner: Callable | None):
        self.running, self.inner = running, inner or recompute

    def __call__(self, module: nn.Module, *args):
        mask_BN = self.running.mask_BN

        def run(*args):
            before = self.running.mask_BN
            if before is mask_BN:  # in the forward pass, and under torch.compile, which allows no mutation here
                return module(*args)
            self.running.mask_BN = mask_BN
            try:
                return module(*args)
            finally:
                self.running.mask_BN = before

        return self.inner(run, *args)


def recompute(block: Callable, *args):
    return checkpoint(block, *args, use_reentrant=False)


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


def skip_rule_choices(unet: ModelMixin, block: str) -> tuple[str, ...]:
    """The rules possible at a ResNet that changes channels."""
    side, level, _, index = block.split(".")
    widths, level = list(reversed(unet.config.block_out_channels)), int(level)
    keeps_width = side == "up_blocks" and (int(index) > 0 or level == 0 or widths[level] == widths[level - 1])
    return ("shortcut", "drop_skip") if keeps_width else ("shortcut",)


# ---- carrying weights over ----


def build_from(
    kind: type[PrunableUNet],
    unet: ModelMixin,
    source: ModelMixin | None,
    architecture: Mapping[str, int | Mapping | BlockSpec] | None,
    skip_rule: str | Mapping[str, str] | None,
    copy_init: str,
) -> PrunableUNet:
    """A new prunable UNet: weights of `unet`, else of `source` (blocks put back), else of the block that is copied."""
    if copy_init not in ("zero", "same"):
        raise ValueError(f"copy_init is {copy_init!r}; choose 'zero' or 'same'")
    rule = unet.config.get("bypass", "shortcut") if skip_rule is None else skip_rule
    table = as_json(as_architecture(architecture or {}))
    with torch.device("meta"), no_init_weights():  # all of them come from elsewhere
        new = kind.from_config(dict(unet.config), depths=table, bypass=rule)
    own, more = unet.state_dict(), source.state_dict() if source is not None else {}
    before = as_architecture(unet.config.get("depths") or {})
    back = tuple(f"{s}." for s in new.kept_blocks if s in before and before[s].repeats == 0)
    own = {key: value for key, value in own.items() if not key.startswith(back)}  # a removed ResNet's shortcut remains
    weights = {key: next((t[k] for k in origins(key) for t in (own, more) if k in t), None) for key in new.state_dict()}
    if missing := [key for key, value in weights.items() if value is None]:
        blocks = [s for s in new.kept_blocks if any(holds(s, key) for key in missing)] or missing
        raise ValueError(f"no weights for {blocks}; with_architecture(…, source=a UNet that holds them) puts them back")
    new.load_state_dict({key: value.detach().clone() for key, value in weights.items()}, assign=True)
    if copy_init == "zero":
        for path in copies_in(weights) - copies_in(own) - copies_in(more):
            silence(new.get_submodule(path))
    return new.train(unet.training)


def origins(key: str) -> Iterator[str]:
    """Where a weight may come from: its own place, or, for a fresh copy, what is copied."""
    yield key
    yield re.sub(r"\.copies\.\d+", "", key, count=1)
    yield re.sub(r"\.copies\.\d+(?!.*\.copies\.)", "", key)
    yield re.sub(r"\.copies\.\d+", "", key)


def copies_in(keys: Mapping[str, Tensor]) -> set[str]:
    """Paths of all copies that hold weights."""
    return {key[: match.end()] for key in keys for match in re.finditer(r"\.copies\.\d+", key)}


def silence(block: nn.Module) -> nn.Module:
    """Zero the last layer of each residual branch: the block becomes the identity."""
    if isinstance(block, ResnetBlock2D):
        last = [block.conv2]
    elif isinstance(block, Transformer2DModel):
        last = [block.proj_out]
    elif isinstance(block, Attention):
        last = [block.to_out[0]]
    else:
        attentions = [a.to_out[0] for a in (block.attn1, block.attn2) if a is not None]
        last = [*attentions, [m for m in block.ff.net if isinstance(m, nn.Linear)][-1]]
    for parameter in (p for layer in last for p in layer.parameters()):
        nn.init.zeros_(parameter)
    return block
