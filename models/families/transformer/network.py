"""The prunable transformer: diffusers' own class, whose lists of equal blocks may be shorter (families/prunable.py).

A block is a whole entry of such a list. A removed one is gone, and the others keep their numbers as long as the network
is pruned here; exports number them anew (stock.py), so that they are always diffusers' own class, and no class file
travels with them.

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
from slimstep.models.families.prunable import Prunable, RunningMask

# The last layers of residual branches, as blocks of diffusers name them.
LAST_LAYERS = (
    "attn.to_out.0", "attn.to_add_out", "attn1.to_out.0", "attn2.to_out.0", "ff.net.2", "ff_context.net.2",
    "ff.conv_point", "img_mlp.net.2", "txt_mlp.net.2", "proj_out",
)  # fmt: skip


class PrunableTransformer(Prunable):
    """Mixed into a transformer of diffusers, before it.

    Beside what `Prunable` asks for the class says `LISTS`, {path of a list of blocks: the field of config.json that
    holds its length}, in order of execution; and `STREAMS`, the arguments of a block that it gives back, in that order,
    of every list or of each. `STAYS` names what cannot be removed, by list and number, and why.
    """

    INPUT = "hidden_states"
    LISTS: Mapping[str, str]
    STREAMS: tuple[str, ...] | Mapping[str, tuple[str, ...]]
    STAYS: Mapping[tuple[str, int], str] = {}

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
        self.settle_streams()

    def find_blocks(self) -> dict[str, nn.Module]:
        return {f"{name}.{i}": module for name in self.LISTS for i, module in getattr(self, name).named_children()}

    def kind_of(self, module: nn.Module) -> str:
        return "transformer"

    def reason_to_stay(self, block: str) -> str | None:
        own = block.rpartition(".")[0]
        of_list = [path for path in self.all_blocks if path.rpartition(".")[0] == own]
        return next((why for (name, k), why in self.STAYS.items() if name == own and of_list[k] == block), None)

    def remove_block(self, path: str) -> None:
        name, _, index = path.rpartition(".")
        if reason := self.reason_to_stay(path):
            raise ValueError(f"{path} of a {self.STOCK.__name__} cannot be removed: {reason}")
        self.get_submodule(name)._modules.pop(index)

    def settle_streams(self) -> None:
        """What changes where another block has become the last to run. None of its output does: it saves time."""

    def masked_class(self, module: nn.Module) -> type[nn.Module]:
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


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """None where there is no such module, or nothing in its place."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


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


@cache
def masked(kind: type[nn.Module], streams: tuple[str, ...]) -> type[nn.Module]:
    """The class of a kept block, for diffusers' class of that block, or for one that is a kept block's already."""
    if issubclass(kind, MaskedTransformerBlock):
        return kind
    names = tuple(inspect.signature(kind.forward).parameters)[1:]  # without self
    return type(f"Masked{kind.__name__}", (MaskedTransformerBlock, kind), {"NAMES": names, "STREAMS": streams})
