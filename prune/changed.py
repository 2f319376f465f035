"""Networks after changes: which of them one offers beside removals, and what it draws after many, in place.

Axes: B rows of a batch, N kept blocks.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor

from slimstep.models.architecture import WHOLE, BlockSpec
from slimstep.models.families.prunable import Prunable
from slimstep.models.families.widths import units_left
from slimstep.prune.changes import DTYPE, MERGE, Change, changes_in, without_kept
from slimstep.prune.config import SearchConfig

Labels = str | tuple[str, ...]  # of one change (changes.py), or of several at once


def narrower_labels(unet: Prunable, shares: Sequence[float]) -> list[str]:
    """The labels of all parts of kept blocks at these shares, those of them that leave fewer units than there are; and
    at 0, where a part can be left out alone."""
    labels = []
    for block in (block for block in unet.kept_blocks if block in unet.width_units):
        present = spec_of(unet, block).widths
        for part, units in unet.width_units[block].items():
            removable = part in unet.removable_parts[block]
            left = units_left(units, present.get(part, 1.0))
            for share in (*sorted(shares, reverse=True), *([0.0] if removable else [])):
                if (count := units_left(units, share)) < left:
                    labels.append(Change(block, part, share).label)
                    left = count
    return labels


def quantized_labels(unet: Prunable, dtypes: Sequence[str]) -> list[str]:
    """The labels of all kept blocks with linear layers, that compute in none of the dtypes yet, in each of them."""
    blocks = [block for block in unet.kept_blocks if block in unet.quantizable_blocks]
    plain = [block for block in blocks if not spec_of(unet, block).dtype]
    return [Change(block, DTYPE, dtype).label for block in plain for dtype in dtypes]


def merged_labels(unet: Prunable, shares: Sequence[float]) -> list[str]:
    """The labels of all kept blocks whose self-attention can merge these shares of its tokens, more than it does."""
    blocks = [block for block in unet.kept_blocks if block in unet.mergeable_blocks]
    return [Change(block, MERGE, share).label for block in blocks for share in sorted(set(shares))
            if share > spec_of(unet, block).merge]  # fmt: skip


def spec_of(unet: Prunable, block: str) -> BlockSpec:
    return unet.architecture.get(block, WHOLE)


def offered_narrower(unet: Prunable, search: SearchConfig) -> list[str]:
    """The labels of what a search may choose beside removals and copies, as search.actions says: narrower parts, other
    dtypes, merged tokens. What goes with a block's earlier changes neither in time nor in value is left out."""
    ways = {"narrow": (narrower_labels, search.widths), "quantize": (quantized_labels, search.dtypes),
            "merge": (merged_labels, search.merge)}  # fmt: skip
    labels = [label for name, (found, own) in ways.items() if name in search.actions for label in found(unet, own)]

    def is_apart(change: Change) -> bool:
        present = changes_in(change.block, spec_of(unet, change.block))
        return not any(change.excludes(other) for other in present if other.part != change.part)

    return [label for label in without_kept(labels, search.keep) if is_apart(Change.of(label))]


def in_place(unet: Prunable, change: Change) -> AbstractContextManager[None]:
    """While this runs the network is what it is after a change that is no removal; no copy of it is made."""
    ways = {DTYPE: unet.with_dtype, MERGE: unet.with_merge}
    if change.part in ways:
        return ways[change.part](change.block, change.share)
    return unet.with_narrower(change.block, change.part, change.share)


def changed(
    unet: Prunable, rows: Sequence[Labels], draw: Callable[[list[int], Tensor | None], Tensor]
) -> Tensor:  # fmt: skip
    """What `draw(rows, block mask of these rows or None)` gives for every row after all changes of its label or labels,
    in their order: removals by a mask, of all rows with the same other changes at once, and these in place."""
    rows_of: dict[tuple[str, ...], list[int]] = {}
    for row, labels in enumerate(map(labels_of, rows)):
        rows_of.setdefault(tuple(label for label in labels if Change.of(label).part), []).append(row)
    drawn: dict[int, Tensor] = {}
    for others, own in rows_of.items():
        mask_BN = torch.ones(len(own), len(unet.kept_blocks), dtype=torch.bool)
        for b, row in enumerate(own):
            removed = set(labels_of(rows[row])) - set(others)
            mask_BN[b, [unet.kept_blocks.index(label) for label in removed]] = False
        with ExitStack() as stack:
            for change in map(Change.of, others):
                stack.enter_context(in_place(unet, change))
            found = draw(own, None if mask_BN.all() else mask_BN.to(unet.device))
        drawn |= zip(own, found, strict=True)
    return torch.stack([drawn[row] for row in range(len(rows))])


def labels_of(row: Labels) -> tuple[str, ...]:
    return (row,) if isinstance(row, str) else row
