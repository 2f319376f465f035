"""The prunable transformer: diffusers' own class, whose lists of equal blocks may be shorter (families/prunable.py).

A block is a whole entry of such a list. A removed one is gone, and the others keep their numbers as long as the network
is pruned here; exports number them anew (stock.py), so that they are diffusers' own class, and no class file travels
with them. With `sublayers` the attentions and feed-forwards of each entry are blocks, too, and a removed one adds
nothing to its residual stream. diffusers' own classes have no such entries: exports without some carry their class.

Axes: B batch.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from slimstep.models.architecture import BlockSpec, copies
from slimstep.models.families.prunable import Prunable, RunningMask, submodule

# The last layers of residual branches, as blocks of diffusers name them.
LAST_LAYERS = (
    "attn.to_out.0", "attn.to_add_out", "attn1.to_out.0", "attn2.to_out.0", "ff.net.2", "ff_context.net.2",
    "ff.conv_point", "ffn.net.2", "img_mlp.net.2", "txt_mlp.net.2", "proj_out",
)  # fmt: skip


class PrunableTransformer(Prunable):
    """Mixed into a transformer of diffusers, before it.

    Beside what `Prunable` asks for the class says `LISTS`, {path of a list of blocks: the field of config.json that
    holds its length}, in order of execution; and `STREAMS`, the arguments of a block that it gives back, in that order,
    of every list or of each. `STAYS` names what cannot be removed, by list and number, and why. `SUBLAYERS` has, for
    each list, the sublayers of an entry in order of execution: {module: {each module that goes with it, its own among
    them: the arguments whose shapes its outputs have, or None for a linear layer}}. sublayers: whether they are blocks.
    """

    INPUT = "hidden_states"
    LISTS: Mapping[str, str]
    STREAMS: tuple[str, ...] | Mapping[str, tuple[str, ...]]
    STAYS: Mapping[tuple[str, int], str] = {}
    SUBLAYERS: Mapping[str, Mapping[str, Mapping[str, tuple[str, ...] | None]]] = {}

    @register_to_config
    def __init__(
        self,
        depths: Mapping[str, int | Mapping | BlockSpec] | None = None,
        bypass: str | Mapping[str, str] = "shortcut",
        auto_map: Mapping[str, str] | None = None,
        sublayers: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.make_prunable(depths, bypass)
        self.settle_streams()

    def divide_blocks(self) -> None:
        """Makes sublayers blocks too, in place. ValueError where they are not known, or the network is pruned."""
        if self.architecture:
            pruned = [*self.architecture]
            raise ValueError(f"the blocks of this {type(self).__name__} cannot be divided: it is pruned at {pruned}")
        self.register_to_config(sublayers=True)
        self.make_prunable({}, "shortcut")

    def find_blocks(self) -> dict[str, nn.Module]:
        if self.config.sublayers and not self.SUBLAYERS:
            raise ValueError(f"the sublayers of a {self.STOCK.__name__} are not known; its blocks are whole ones alone")
        found = {}
        for name in self.LISTS:
            for i, entry in getattr(self, name).named_children():
                found[f"{name}.{i}"] = entry
                if self.config.sublayers:
                    found |= {f"{name}.{i}.{part}": getattr(entry, part) for part in self.SUBLAYERS[name]}
        return found

    def parts_of(self, block: str) -> dict[str, tuple[str, ...] | None]:
        """{path: what it gives} of the modules that a sublayer consists of; empty for a whole block."""
        holder, _, own = block.rpartition(".")
        parts = self.SUBLAYERS.get(block.split(".")[0], {}).get(own, {})
        return {path: gives for part, gives in parts.items() if submodule(self, path := f"{holder}.{part}")}

    def modules_of(self, block: str) -> Iterator[nn.Module]:
        yield from map(self.get_submodule, self.parts_of(block) or (block,))

    def can_be_copied(self, block: str) -> bool:
        return block not in self.parents

    def kind_of(self, module: nn.Module) -> str:
        entries = (entry for name in self.LISTS for entry in getattr(self, name).children())
        return "transformer" if any(module is entry for entry in entries) else "sublayer"

    def reason_to_stay(self, block: str) -> str | None:
        own = block.rpartition(".")[0]
        of_list = [path for path in self.all_blocks if path.rpartition(".")[0] == own]
        return next((why for (name, k), why in self.STAYS.items() if name == own and of_list[k] == block), None)

    def remove_block(self, path: str) -> None:
        if parts := self.parts_of(path):
            for part, gives in parts.items():
                self.set_submodule(part, RemovedSublayer(self.get_submodule(part), gives))
            return
        name, _, index = path.rpartition(".")
        if reason := self.reason_to_stay(path):
            raise ValueError(f"{path} of a {self.STOCK.__name__} cannot be removed: {reason}")
        self.get_submodule(name)._modules.pop(index)

    def settle_streams(self) -> None:
        """What changes where another block has become the last to run. None of its output does: it saves time."""

    def masked_class(self, module: nn.Module) -> type[nn.Module]:
        if isinstance(module, MaskedSublayer) or self.kind_of(module) == "sublayer":
            return masked_sublayer(type(module))
        if isinstance(self.STREAMS, tuple):
            return masked(type(module), self.STREAMS)
        own = next(name for name in self.LISTS if any(module is block for block in getattr(self, name).children()))
        return masked(type(module), self.STREAMS[own])

    def zero_init(self, block: nn.Module) -> nn.Module:
        layers = [layer for name in LAST_LAYERS if (layer := submodule(block, name)) is not None]
        for parameter in (p for layer in layers for p in layer.parameters()):
            nn.init.zeros_(parameter)
        return block

    def adopt_rest(self, source: ModelMixin) -> None:
        adopt_rest(self, source, self.LISTS)
        if "sample_size" in source.config:  # which diffusers' own class may not know
            self.register_to_config(sample_size=source.config.sample_size)

    def running_paths(self, name: str) -> Iterator[str]:
        """The paths of a list's modules in the order in which they run: kept blocks, each with its copies."""
        for block in (block for block in self.kept_blocks if block.rpartition(".")[0] == name):
            yield from (block, *copies(block, self.architecture))

    # ---- what a class adds to the stock configuration and weights (stock.py)

    def size_fields(self) -> dict[str, Any]:
        """Fields of config.json that say which size the positions were made for."""
        return {}

    def stock_fields(self) -> dict[str, Any]:
        """Fields of config.json that depend on the numbers of blocks, beside the lengths of the lists."""
        return {}

    def stock_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights, under their names here, as diffusers' own class has them."""
        return weights


def adopt_rest(network: ModelMixin, source: ModelMixin, lists: Iterable[str]) -> None:
    """Copies of the modules of another network that hold no blocks: some have tensors that are in no state dict."""
    for name, module in source.named_children():
        if name not in lists:
            setattr(network, name, copy.deepcopy(module))


class MaskedTransformerBlock:
    """Mixed into the class of a kept block: runs its copies too, and lets samples skip them where the mask says so."""

    NAMES: tuple[str, ...]
    STREAMS: tuple[str, ...]
    running: RunningMask
    column: int
    copies: nn.ModuleList | tuple

    def forward(self, *args, **kwargs):
        inputs = {**dict(zip(self.NAMES, args, strict=False)), **kwargs}
        before = [inputs[name] for name in self.STREAMS]
        output = super().forward(**inputs)
        for module in self.copies:
            inputs.update(zip(self.STREAMS, output if isinstance(output, tuple) else (output,), strict=True))
            output = module(**inputs)
        if self.running.mask_BN is None:
            return output
        after = output if isinstance(output, tuple) else (output,)
        open_B = self.running.mask_BN[:, self.column]
        # where, not a product: 0 * inf in a closed branch would still be nan. The last block gives nothing of the text.
        after = tuple(
            None if y is None else torch.where(open_B.view(-1, *[1] * (y.ndim - 1)), y, x)
            for x, y in zip(before, after, strict=True)
        )
        return after if isinstance(output, tuple) else after[0]


class MaskedSublayer:
    """Mixed into the class of a kept sublayer: it gives zeros for samples whose mask is closed."""

    running: RunningMask
    column: int

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if self.running.mask_BN is None:
            return output
        open_B = self.running.mask_BN[:, self.column]

        def masked(y: Tensor) -> Tensor:
            return torch.where(open_B.view(-1, *[1] * (y.ndim - 1)), y, 0)

        return tuple(map(masked, output)) if isinstance(output, tuple) else masked(output)


class RemovedSublayer(nn.Module):
    """What is left of a sublayer: zeros, shaped as the arguments that `gives` names, or as a linear layer's output."""

    def __init__(self, module: nn.Module, gives: tuple[str, ...] | None) -> None:
        super().__init__()
        # A kept sublayer's own forward names no arguments: those are in diffusers' class of it.
        kind = next(kind for kind in type(module).__mro__ if not issubclass(kind, MaskedSublayer))
        self.first, self.gives = list(inspect.signature(kind.forward).parameters)[1], gives
        self.width = None if gives else module.out_features

    def forward(self, *args, **kwargs):
        inputs = {self.first: args[0], **kwargs} if args else kwargs
        if not self.gives:
            x = inputs[self.first]
            return x.new_zeros(*x.shape[:-1], self.width)
        zeros = tuple(torch.zeros_like(inputs[name]) for name in self.gives)
        return zeros if len(zeros) > 1 else zeros[0]


@cache
def masked_sublayer(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a kept sublayer, for diffusers' class of it, or for one that is a kept sublayer's already."""
    return kind if issubclass(kind, MaskedSublayer) else type(f"Masked{kind.__name__}", (MaskedSublayer, kind), {})


@cache
def masked(kind: type[nn.Module], streams: tuple[str, ...]) -> type[nn.Module]:
    """The class of a kept block, for diffusers' class of that block, or for one that is a kept block's already."""
    if issubclass(kind, MaskedTransformerBlock):
        return kind
    names = tuple(inspect.signature(kind.forward).parameters)[1:]  # without self
    return type(f"Masked{kind.__name__}", (MaskedTransformerBlock, kind), {"NAMES": names, "STREAMS": streams})
