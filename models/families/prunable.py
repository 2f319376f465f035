"""What every prunable network shares: blocks that can be removed, copied, and masked for each sample.

An architecture is a table {block: BlockSpec} (models/architecture.py), a block the module path of something that has
its input's shape, or of a UNet's ResNet. Everything else, names included, is diffusers' own class, which `Prunable` is
mixed into: families/unet.py does it for UNets, families/transformer/ for transformers.

Axes: B batch, N kept blocks.
"""

import copy
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ModelMixin
from diffusers.models.modeling_utils import no_init_weights
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
)
from slimstep.models.families.merged import merge_tokens, merging
from slimstep.models.families.quantized import quantize, quantizing, token_linears
from slimstep.models.families.widths import can_go, narrow, narrowed_copy, parts_of, units_left, zeroed

OURS = re.compile(r"^from (slimstep\.[\w.]+) import (?:\(.*?\)|[^\n]*)\n", flags=re.M | re.S)


def class_file(file: str, kind: str = "unet") -> tuple[str, str]:
    """The name under which the file of a class travels with exports, and its text: what it imports of ours stands in
    the place of the imports. diffusers keys imported files by their names alone, hence the hash."""
    text, inlined = Path(file).read_text(encoding="utf-8"), set()
    while imported := OURS.search(text):  # an export's own file has none
        name = imported[1]
        inner = "" if name in inlined else Path(find_spec(name).origin).read_text(encoding="utf-8")
        text = text[: imported.start()] + inner + text[imported.end() :]
        inlined.add(name)
    return f"slimstep_{kind}_{hashlib.sha256(text.encode()).hexdigest()[:10]}", text


class Prunable(ModelMixin):
    """Mixed into a network of diffusers, before it: an architecture table and block masks.

    The class says `STOCK`, diffusers' own, `INPUT`, its forward's first argument, and, by the methods under "what a
    kind of network says", what its blocks are; `CLASS_FILE` is `class_file` of its module, None where no file travels.
    Its constructor takes the following beside the stock arguments, and calls `make_prunable`.
    depths: the architecture, as config.json holds it: {block: repeats}.
    bypass: the skip rule, what is left of a removed block that is not the identity (families/unet.py).
    auto_map: written by save_config where the class travels with exports.
    Raises ValueError for unknown blocks, for copies of a block that cannot run twice, and for an impossible skip rule.

    architecture: {block: BlockSpec}, in order of execution and without what says nothing.
    blocks: all prunable paths in order of execution, removed ones included. kept_blocks: those that run.
    kinds: {block: 'resnet', 'attention', 'transformer' or 'sublayer'}. parents: {layer: the block that holds it}; a
    removed or closed block takes its layers along. copyable_blocks: those that can run more than once.
    skip_rules: {block: its rule}, for ResNets that change channels; skip_rule_choices: {block: those possible there}.
    levels: the innermost levels that can go as a whole, from the inside out.
    width_units: {block: {part: its units in the whole network}} of blocks that can be narrower (widths.py), of those
    that hold others the innermost alone. removable_parts: {block: those of its parts that can be left out alone}.
    quantizable_blocks: those with linear layers that can compute in another dtype (quantized.py), and mergeable_blocks:
    those whose self-attention can merge tokens (merged.py); of both the innermost alone.
    """

    STOCK: type[ModelMixin]
    INPUT: str
    CLASS_FILE: tuple[str, str] | None = None

    def make_prunable(
        self, depths: Mapping[str, int | Mapping | BlockSpec] | None, bypass: str | Mapping[str, str]
    ) -> None:
        """The rest of the constructor, once the stock network is built."""
        if self.CLASS_FILE:
            self.__module__ = self.CLASS_FILE[0]  # which a pipeline writes into model_index.json, to find the class by
        modules = self.find_blocks()
        self.all_blocks = tuple(modules)
        self.kinds = {s: self.kind_of(m) for s, m in modules.items()}
        self.parents = {s: parent for s in modules if (parent := holder_of(s, modules))}
        self.levels = self.removable_levels()
        self.skip_rule_choices = {s: choices for s, m in modules.items() if (choices := self.rules_possible_at(s, m))}
        self.copyable_blocks = tuple(s for s in modules if self.can_be_copied(s))
        self.skip_rules = self._skip_rule_of_each_block(bypass)
        holders = set(self.parents.values())
        parts = {s: parts_of(m) for s, m in modules.items() if s not in holders}
        self.removable_parts = {s: tuple(n for n in own if can_go(modules[s], n)) for s, own in parts.items()}
        units = {s: {name: part.units for name, part in own.items()} for s, own in parts.items()}
        units = {s: {n: k for n, k in own.items() if k > 1 or n in self.removable_parts[s]} for s, own in units.items()}
        self.width_units = {s: own for s, own in units.items() if own}
        innermost = [s for s in modules if s not in holders]
        self.quantizable_blocks = tuple(s for s in innermost if self.linears_of(s))
        self.mergeable_blocks = tuple(s for s in innermost if self.self_attentions_of(s))
        self.architecture = canonical(as_architecture(depths or {}), self.all_blocks, self.levels, self.copyable_blocks)
        self._check_widths()
        self._check_dtypes_and_merges()
        self.kept_blocks = kept(self.all_blocks, self.architecture, self.levels)
        written = {"depths": as_json(self.architecture), "bypass": bypass if isinstance(bypass, str) else dict(bypass)}
        self.register_to_config(**written)

        self._running = RunningMask()
        self._remove_and_copy(modules)
        self._watch_mask()

    @property
    def blocks(self) -> tuple[str, ...]:
        """All prunable paths. Where a class has a list of modules of this name, it is `all_blocks` alone."""
        return self.all_blocks

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """diffusers reads a config's fields off the signature, where **kwargs hides the stock ones."""
        keys = set(inspect.signature(input_class.__init__).parameters)
        return keys | set(inspect.signature(input_class.STOCK.__init__).parameters) if "depths" in keys else keys

    # ---- what a kind of network says ----

    def find_blocks(self) -> dict[str, nn.Module]:
        """{path: module} of all blocks, in order of execution."""
        raise NotImplementedError

    def kind_of(self, module: nn.Module) -> str:
        raise NotImplementedError

    def modules_of(self, block: str) -> Iterator[nn.Module]:
        """What a block, or its twin in a copy, consists of."""
        yield self.get_submodule(block)

    def remove_block(self, path: str) -> None:
        """Takes a module that is a block out; what runs in its place is what its skip rule gives."""
        raise NotImplementedError

    def masked_class(self, module: nn.Module) -> type[nn.Module]:
        """A subclass of a block's class that looks at the mask, and runs its copies."""
        raise NotImplementedError

    def self_attentions_of(self, path: str) -> list[nn.Module]:
        """Of a block, or its twin in a copy, those that can merge tokens (merged.py)."""
        return []

    def settle_merges(self) -> None:
        """What changes where other self-attentions merge tokens."""

    def zero_init(self, block: nn.Module) -> nn.Module:
        """The same module with the last layer of each residual branch zero: it becomes the identity."""
        raise NotImplementedError

    def adopt_rest(self, source: ModelMixin) -> None:
        """Takes over from the network whose weights this one has what is in no state dict."""

    def rules_possible_at(self, block: str, module: nn.Module) -> tuple[str, ...]:
        """The skip rules of a block that is not the identity when it is removed; none for others."""
        return ()

    def can_be_copied(self, block: str) -> bool:
        return True

    def removable_levels(self) -> Levels:
        return {}

    def remove_level(self, level: str) -> None:
        raise NotImplementedError

    # ---- the architecture table ----

    def repeats(self, block: str) -> int:
        """How often a block runs; 0 where it, or what holds it, is removed."""
        return repeats_of(block, self.architecture, self.levels)

    def instances(self, block: str) -> Iterator[str]:
        """The block itself, and, for a layer, its twins in the copies of the transformer that holds it."""
        return instances(block, self.architecture, self.parents.get(block))

    def runs_of(self, block: str) -> Iterator[str]:
        """The paths of all modules that are this block: it, its copies, and their twins in a holder's copies."""
        for path in self.instances(block):
            yield from (path, *(f"{path}.copies.{k}" for k in range(self.repeats(block) - 1)))

    def units_of(self, block: str) -> dict[str, int]:
        """{part: units that stay} of a block that the architecture narrows."""
        units = self.width_units.get(block, {})
        return {name: units_left(units[name], share) for name, share in self.architecture[block].widths.items()}

    def _check_widths(self) -> None:
        """ValueError for widths of parts that a block does not have, or that cannot be left out."""
        for block, spec in self.architecture.items():
            units, removable = self.width_units.get(block, {}), self.removable_parts.get(block, ())
            if unknown := sorted(set(spec.widths) - set(units)):
                raise ValueError(f"the architecture narrows {unknown} of {block}, whose parts are {tuple(units)}")
            if fixed := [name for name, share in spec.widths.items() if share == 0 and name not in removable]:
                raise ValueError(f"the architecture leaves {fixed} out of {block}; it can do without {removable} alone")

    def _check_dtypes_and_merges(self) -> None:
        """ValueError for blocks without linear layers that compute in another dtype, or self-attentions that merge."""
        for block, spec in self.architecture.items():
            if spec.dtype and block not in self.quantizable_blocks:
                able = f"it has no linear layers of its own for tokens; these blocks do: {self.quantizable_blocks}"
                raise ValueError(f"the architecture gives {block} dtype={spec.dtype!r}, and {able}")
            if spec.merge and block not in self.mergeable_blocks:
                able = self.mergeable_blocks or f"none of a {self.STOCK.__name__}"
                which = f"blocks whose self-attention can merge tokens: {able}"
                raise ValueError(f"the architecture gives {block} merge={spec.merge!r}; {which}")

    def linears_of(self, path: str) -> list[nn.Linear]:
        """The linear layers for tokens of a block, or of its twin in a copy."""
        return [layer for module in self.modules_of(path) for layer in token_linears(module).values()]

    @contextmanager
    def with_dtype(self, block: str, dtype: str) -> Iterator[None]:
        """While this runs the linear layers of a block compute in int8 or fp8."""
        with quantizing([layer for path in self.runs_of(block) for layer in self.linears_of(path)], dtype):
            yield

    @contextmanager
    def with_merge(self, block: str, share: float) -> Iterator[None]:
        """While this runs a block's self-attention merges a share of its tokens."""
        attentions = [module for path in self.runs_of(block) for module in self.self_attentions_of(path)]
        with ExitStack() as stack:
            stack.callback(self.settle_merges)
            stack.enter_context(merging(attentions, share))
            self.settle_merges()
            yield

    @contextmanager
    def with_narrower(self, block: str, part: str, share: float) -> Iterator[None]:
        """While this runs the network gives, to rounding, what it would with a part of a block at a share of its width;
        its shapes and its speed do not change."""
        count = units_left(self.width_units[block][part], share)
        with ExitStack() as stack:
            for path in self.runs_of(block):
                stack.enter_context(zeroed(self.get_submodule(path), part, count))
            yield

    def _skip_rule_of_each_block(self, rule: str | Mapping[str, str]) -> dict[str, str]:
        """{block: rule} for every block that has one."""
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

    # ---- building ----

    @classmethod
    def from_unet(
        cls,
        unet: ModelMixin,
        architecture: Mapping[str, int | Mapping | BlockSpec] | None = None,
        skip_rule: str | Mapping[str, str] | None = None,
        copy_init: str = "zero",
    ) -> Self:
        """A prunable network with copies of another's weights; where None, `unet`'s own table and rule, if any."""
        table = unet.config.get("depths") if architecture is None else architecture
        return build_from(cls, unet, None, table, skip_rule, copy_init)

    def with_architecture(
        self,
        architecture: Mapping[str, int | Mapping | BlockSpec],
        source: ModelMixin | None = None,
        copy_init: str = "zero",
    ) -> Self:
        """A new network with these entries over the present table, and copies of this one's weights.

        source: a network that holds the removed blocks which this puts back. copy_init: 'zero' zeroes the last layer of
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
                self.remove_block(block)
                continue
            spec = self.architecture[block]
            narrow(modules[block], self.units_of(block))
            if spec.dtype:
                quantize(self.linears_of(block), spec.dtype)
            if spec.merge:
                merge_tokens(self.self_attentions_of(block), spec.merge)
            if repeats > 1:
                copies = [copy.deepcopy(modules[block]) for _ in range(repeats - 1)]
                modules[block].copies = nn.ModuleList(map(self.zero_init, copies))

    def _watch_mask(self) -> None:
        """Give each kept block's module the class that looks at the mask; paths and parameters stay what they are."""
        for column, block in enumerate(self.kept_blocks):
            for module in chain.from_iterable(map(self.modules_of, self.instances(block))):
                module.__class__ = self.masked_class(module)
                module.running, module.column = self._running, column
                module.rule = self.skip_rules.get(block, "identity")
                if self.repeats(block) == 1:
                    module.copies = ()
        self.settle_merges()

    # ---- travelling ----

    def save_config(self, save_directory: str | Path, *args, **kwargs) -> None:
        """As in diffusers; this file goes along, so that whoever saves the network has its class in the folder, too."""
        if self.CLASS_FILE:
            name, text = self.CLASS_FILE
            self.register_to_config(auto_map={"AutoModel": f"{name}.{type(self).__name__}"})
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            (Path(save_directory) / f"{name}.py").write_text(text, encoding="utf-8")
        super().save_config(save_directory, *args, **kwargs)

    # ---- running ----

    def forward(self, *args, block_mask: Tensor | None = None, **kwargs):
        """The stock forward. block_mask: Bool[B, N]; where False, that sample skips that kept block."""
        if block_mask is None:
            return super().forward(*args, **kwargs)
        rows = len(args[0] if args else kwargs[self.INPUT])
        assert block_mask.shape == (rows, len(self.kept_blocks)), (
            f"block mask {tuple(block_mask.shape)} for a batch of {rows} and {len(self.kept_blocks)} kept blocks"
        )
        self._running.mask_BN = block_mask
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._running.mask_BN = None

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable | None = None) -> None:
        """As in diffusers; a block that is run again in the backward pass sees the mask it saw in the forward."""
        super().enable_gradient_checkpointing(CheckpointWithMask(self._running, gradient_checkpointing_func))


# ---- the mask of a running network ----


class RunningMask:
    """The block mask of the forward that is running; every block of one network reads the same object."""

    mask_BN: Tensor | None = None


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


# ---- carrying weights over ----


def build_from(
    kind: type[Prunable],
    unet: ModelMixin,
    source: ModelMixin | None,
    architecture: Mapping[str, int | Mapping | BlockSpec] | None,
    skip_rule: str | Mapping[str, str] | None,
    copy_init: str,
) -> Prunable:
    """A new prunable network: weights of `unet`, else of `source` (blocks put back), else of what is copied."""
    if copy_init not in ("zero", "same"):
        raise ValueError(f"copy_init is {copy_init!r}; choose 'zero' or 'same'")
    rule = unet.config.get("bypass", "shortcut") if skip_rule is None else skip_rule
    table = as_json(as_architecture(architecture or {}))
    with torch.device("meta"), no_init_weights():  # all of them come from elsewhere
        new = kind.from_config(fields_of(unet), depths=table, bypass=rule)
    own, more = unet.state_dict(), source.state_dict() if source is not None else {}
    before = as_architecture(unet.config.get("depths") or {})
    back = tuple(f"{s}." for s in new.kept_blocks if s in before and before[s].repeats == 0)
    own = {key: value for key, value in own.items() if not key.startswith(back)}  # a removed ResNet's shortcut remains
    weights = {key: next((t[k] for k in origins(key) for t in (own, more) if k in t), None) for key in new.state_dict()}
    weights |= narrowed_weights(new, [network for network in (unet, source) if network is not None])
    if missing := [key for key, value in weights.items() if value is None]:
        blocks = [s for s in new.kept_blocks if any(holds(s, key) for key in missing)] or missing
        raise ValueError(f"no weights for {blocks}; with_architecture(…, source=a UNet that holds them) puts them back")
    check_shapes(new, weights)
    new.load_state_dict({key: value.detach().clone() for key, value in weights.items()}, assign=True)
    new.adopt_rest(unet)
    if copy_init == "zero":
        for path in copies_in(weights) - copies_in(own) - copies_in(more):
            new.zero_init(new.get_submodule(path))
    return new.train(unet.training)


def narrowed_weights(new: Prunable, sources: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The weights of narrowed blocks: the strongest units of the first of the sources that has the block."""
    weights: dict[str, Tensor] = {}
    units = {block: new.units_of(block) for block, spec in new.architecture.items() if spec.widths}
    for path, widths in ((path, widths) for block, widths in units.items() for path in new.runs_of(block)):
        needed = {key for key in new.get_submodule(path).state_dict() if not key.startswith("copies.")}
        found = (submodule(source, origin) for origin in origins(path) for source in sources)
        if module := next((m for m in found if m is not None and needed <= m.state_dict().keys()), None):
            own = narrowed_copy(module, widths).state_dict()
            weights |= {f"{path}.{key}": own[key] for key in needed}
    return weights


def check_shapes(new: Prunable, weights: Mapping[str, Tensor]) -> None:
    """ValueError for a block that would have to be wider than it is where its weights are from."""
    shapes = {key: weight.shape for key, weight in new.state_dict().items()}
    if differing := [key for key, weight in weights.items() if weight.shape != shapes[key]]:
        blocks = [s for s in new.kept_blocks if any(holds(s, key) for key in differing)] or differing
        raise ValueError(f"{blocks} are narrower than the architecture has them: lost units do not come back")


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """None where there is no such module, or nothing in its place."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def fields_of(network: ModelMixin) -> dict[str, Any]:
    """A network's configuration for another one. diffusers keeps a list in it of the fields that were at their defaults
    when it was built, and would set these to the defaults again, also where something else was registered since."""
    return {name: value for name, value in network.config.items() if name != "_use_default_values"}


def origins(key: str) -> Iterator[str]:
    """Where a weight may come from: its own place, or, for a fresh copy, what is copied."""
    yield key
    yield re.sub(r"\.copies\.\d+", "", key, count=1)
    yield re.sub(r"\.copies\.\d+(?!.*\.copies\.)", "", key)
    yield re.sub(r"\.copies\.\d+", "", key)


def copies_in(keys: Mapping[str, Tensor]) -> set[str]:
    """Paths of all copies that hold weights."""
    return {key[: match.end()] for key in keys for match in re.finditer(r"\.copies\.\d+", key)}
