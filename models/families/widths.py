"""Narrower blocks: fewer heads of an attention, hidden channels of a feed-forward, or channels inside a ResNet.

What a block takes and gives keeps its width; a *part* of its inside loses some of its units. An attention has heads, a
feed-forward hidden channels, and a ResNet whole groups of its second norm, so that the statistics of the others stay
what they are. A narrowed part computes what the whole one does with the columns of the lost units zero (`zeroed`), to
rounding. Which units stay is read off the weights, whatever device they lie on: those that can write the most.

This file travels with exports, in the class file of their network.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import AttnAddedKVProcessor, AttnAddedKVProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


@dataclass(frozen=True)
class Slice:
    """The rows (dim 0) or columns (dim 1) of a layer that belong to the units of a part: `size` for each, from `start`
    on; `halves` times over where values and their gates lie behind one another."""

    layer: str
    dim: int
    size: int = 1
    halves: int = 1
    start: int = 0

    def places(self, units: Iterable[int], of: int) -> list[int]:
        """Where some of `of` units lie."""
        first = [self.start + (half * of + unit) * self.size for half in range(self.halves) for unit in units]
        return [place + k for place in first for k in range(self.size)]


@dataclass(frozen=True)
class Part:
    """A part of a block: how many units it has, the slices that grow with them, and the columns that read them.
    `written` are those of the slices that a unit's strength is read off. owner: the module that knows the number."""

    owner: str
    units: int
    rows: tuple[Slice, ...]
    columns: tuple[Slice, ...]
    written: tuple[Slice, ...]


# ---- what a block can be narrowed in ----


def parts_of(block: nn.Module) -> dict[str, Part]:
    """{name: part} of a block: 'channels' of a ResNet, 'heads' or 'hidden' of a block that is an attention or a
    feed-forward itself, else the name of the module. Empty where nothing is known of its class."""
    if isinstance(block, ResnetBlock2D):
        return found_parts({"channels": resnet_part(block)})
    if is_attention(block) or is_feed_forward(block):
        return found_parts({"heads" if is_attention(block) else "hidden": module_part("", block)})
    layers = getattr(block, "transformer_blocks", None)
    if layers is not None:
        inner = "transformer_blocks.0."
        return {name: moved(part, inner) for name, part in parts_of(layers[0]).items()} if len(layers) == 1 else {}
    found = {name: module_part(f"{name}.", module) for name, module in block.named_children()}
    if hasattr(block, "proj_mlp") and hasattr(block, "attn"):  # FLUX: one layer reads both, side by side
        found |= parallel_parts(block)
    return found_parts(found)


def found_parts(parts: Mapping[str, Part | None]) -> dict[str, Part]:
    return {name: part for name, part in parts.items() if part}


def module_part(path: str, module: nn.Module) -> Part | None:
    if is_attention(module):
        return attention_part(path, module) if hasattr(module, "to_out") else None
    return feed_forward_part(path, module) if is_feed_forward(module) else None


def is_attention(module: nn.Module) -> bool:
    """Whether this is an attention of equally many heads for queries, keys and values, each normalised by itself.

    DeepFloyd IF's are none: diffusers takes their output for as wide as their input.
    """
    if isinstance(getattr(module, "processor", None), (AttnAddedKVProcessor, AttnAddedKVProcessor2_0)):
        return False
    linears = [getattr(module, name, None) for name in ("to_q", "to_k", "to_v")]
    if not all(isinstance(layer, nn.Linear) for layer in linears) or not hasattr(module, "heads"):
        return False
    widths = {layer.out_features for layer in linears}
    norms = [getattr(module, name, None) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    scales = [weight for norm in norms if (weight := getattr(norm, "weight", None)) is not None]
    return len(widths) == 1 and all(scale.numel() * module.heads == max(widths) for scale in scales)


def is_feed_forward(module: nn.Module) -> bool:
    return isinstance(module, FeedForward) or hasattr(module, "conv_inverted")


def attention_part(path: str, attention: nn.Module) -> Part:
    head = attention.to_q.out_features // attention.heads
    names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    rows = {name: Slice(f"{path}{name}", 0, head) for name in names if getattr(attention, name, None) is not None}
    columns = [Slice(f"{path}to_out.0", 1, head)]
    columns += [Slice(f"{path}to_add_out", 1, head)] if getattr(attention, "to_add_out", None) is not None else []
    written = tuple(of for name, of in rows.items() if "_v" in name)
    return Part(path[:-1], attention.heads, tuple(rows.values()), tuple(columns), written)


def feed_forward_part(path: str, module: nn.Module) -> Part | None:
    if isinstance(module, FeedForward):
        inner, outer = getattr(module.net[0], "proj", None), module.net[2]
        if not isinstance(inner, nn.Linear) or inner.out_features % outer.in_features:
            return None
        rows = (Slice(f"{path}net.0.proj", 0, halves=inner.out_features // outer.in_features),)
        return Part(path[:-1], outer.in_features, rows, (Slice(f"{path}net.2", 1),), rows)
    rows = tuple(Slice(f"{path}{name}", 0, halves=2) for name in ("conv_inverted", "conv_depth"))  # Sana's
    return Part(path[:-1], module.conv_point.in_channels, rows, (Slice(f"{path}conv_point", 1),), rows)


def resnet_part(resnet: ResnetBlock2D) -> Part | None:
    norm = resnet.norm2
    if not isinstance(norm, nn.GroupNorm):
        return None
    size, rows = norm.num_channels // norm.num_groups, []
    if resnet.time_emb_proj is not None:
        halves = resnet.time_emb_proj.out_features // norm.num_channels  # two where it scales and shifts
        rows.append(Slice("time_emb_proj", 0, size, halves))
    rows += [Slice("conv1", 0, size), Slice("norm2", 0, size)]
    return Part("norm2", norm.num_groups, tuple(rows), (Slice("conv2", 1, size),), (rows[-1],))


def parallel_parts(block: nn.Module) -> dict[str, Part]:
    """Attention and feed-forward whose outputs one layer, `proj_out`, takes side by side."""
    found, attention, mlp = {}, block.attn, block.proj_mlp
    if isinstance(mlp, nn.Linear):
        rows, width = (Slice("proj_mlp", 0),), mlp.out_features
        columns = (Slice("proj_out", 1, start=block.proj_out.in_features - width),)
        found["proj_mlp"] = Part("proj_mlp", width, rows, columns, rows)
    if is_attention(attention):
        head = attention.to_q.out_features // attention.heads
        rows = tuple(Slice(f"attn.{name}", 0, head) for name in ("to_q", "to_k", "to_v"))
        found["attn"] = Part("attn", attention.heads, rows, (Slice("proj_out", 1, head),), rows[2:])
    return found


def moved(part: Part, path: str) -> Part:
    """The same part as the block that holds it names it."""

    def own(slices: Sequence[Slice]) -> tuple[Slice, ...]:
        return tuple(Slice(f"{path}{s.layer}", s.dim, s.size, s.halves, s.start) for s in slices)

    return Part(f"{path}{part.owner}", part.units, own(part.rows), own(part.columns), own(part.written))


def can_go(block: nn.Module, name: str) -> bool:
    """Whether a part may be left out alone: what its module gives is added to a residual stream."""
    part = parts_of(block).get(name)
    holder = block.get_submodule(part.owner.rpartition(".")[0]) if part else None
    return isinstance(holder, BasicTransformerBlock)


# ---- which units stay ----


def units_left(units: int, share: float) -> int:
    """Units that stay of a part for a share of its width: one at least, none for 0."""
    return max(1, math.floor(share * units + 0.5)) if share else 0


def strongest(block: nn.Module, part: Part, count: int) -> list[int]:
    """The units that can write the most, ascending: ‖what writes a unit‖ · ‖the columns that read it‖."""

    def squares(slices: Sequence[Slice]) -> Tensor:
        total = torch.zeros(part.units, dtype=torch.float64)
        for of in slices:
            layer = block.get_submodule(of.layer)
            tensors = [layer.weight, *([layer.bias] if of.dim == 0 and layer.bias is not None else [])]
            for tensor in tensors:
                rows = tensor.detach().transpose(0, of.dim).double().cpu().flatten(1 if tensor.ndim > 1 else 0)
                rows = rows.square().sum(1) if rows.ndim > 1 else rows.square()
                places = torch.tensor(of.places(range(part.units), part.units))
                total += rows[places].view(of.halves, part.units, of.size).sum((0, 2))
        return total

    strength = squares(part.written) * squares(part.columns)
    return sorted(strength.argsort(descending=True, stable=True)[:count].tolist())


# ---- narrowing ----


def narrow(block: nn.Module, widths: Mapping[str, int]) -> None:
    """Narrows parts of a block, in place, to so many units each, the strongest, or the first where its weights are not
    there yet; a part of none is left out. A part that has no more units stays as it is."""
    for name, count in widths.items():
        if (part := parts_of(block).get(name)) is None or part.units <= count:
            continue
        if count == 0:
            block.set_submodule(part.owner, LeftOut())
            continue
        is_bare = next(block.parameters()).is_meta
        keep_units(block, part, range(count) if is_bare else strongest(block, part, count))


def keep_units(block: nn.Module, part: Part, kept: Sequence[int]) -> None:
    lost = sorted(set(range(part.units)) - set(kept))
    for of in (*part.rows, *part.columns):
        keep_channels(block.get_submodule(of.layer), of.dim, of.places(lost, part.units))
    owner = block.get_submodule(part.owner)
    if isinstance(owner, nn.GroupNorm):
        owner.num_groups = len(kept)
    for attribute in ("heads", "sliceable_head_dim"):
        if hasattr(owner, attribute):
            setattr(owner, attribute, len(kept))
    for attribute in ("inner_dim", "inner_kv_dim"):
        if hasattr(owner, attribute):
            setattr(owner, attribute, getattr(owner, attribute) // part.units * len(kept))


def keep_channels(layer: nn.Module, dim: int, lost: Sequence[int]) -> None:
    """Takes rows or columns out of a linear layer, a convolution or a norm."""
    size = layer.weight.shape[dim]
    index = torch.tensor(sorted(set(range(size)) - set(lost)), device=layer.weight.device)
    names = ["weight", *(["bias"] if dim == 0 and layer.bias is not None else [])]
    for name in names:
        old = getattr(layer, name)
        setattr(layer, name, nn.Parameter(old.detach().index_select(dim, index).clone(), old.requires_grad))
    is_depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
    sizes = ("out_features", "out_channels", "num_channels") if dim == 0 else ("in_features", "in_channels")
    for attribute in (*sizes, *(("in_channels", "groups") if is_depthwise else ())):
        if hasattr(layer, attribute):
            setattr(layer, attribute, len(index))


class LeftOut(nn.Module):
    """What stands in the place of an attention or feed-forward that is left out: it gives zeros."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return torch.zeros_like(x)


def narrowed_copy(block: nn.Module, widths: Mapping[str, int]) -> nn.Module:
    """A copy of a block without copies of its own, narrowed."""
    kept = block._modules.pop("copies", None)
    try:
        copied = copy.deepcopy(block)
    finally:
        if kept is not None:
            block._modules["copies"] = kept
    narrow(copied, widths)
    return copied


@contextmanager
def zeroed(block: nn.Module, name: str, count: int) -> Iterator[None]:
    """While the block runs its part `name` gives what it would with `count` units, in a network of unchanged shapes."""
    part = parts_of(block)[name]
    lost = sorted(set(range(part.units)) - set(strongest(block, part, count)))
    layers = {of: block.get_submodule(of.layer) for of in part.columns}
    before = [(p, p.detach().clone()) for layer in layers.values() for p in layer.parameters()]
    try:
        with torch.no_grad():
            for of, layer in layers.items():
                layer.weight[:, of.places(lost, part.units)] = 0
                if count == 0 and layer.bias is not None:
                    layer.bias.zero_()
        yield
    finally:
        with torch.no_grad():
            for parameter, values in before:
                parameter.copy_(values)
