"""Networks after changes: which narrower parts one offers, and what it draws after many changes, in place.

Axes: B rows of a batch, N kept blocks.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slimstep.models.architecture import WHOLE
from slimstep.models.families.prunable import Prunable
from slimstep.models.families.widths import units_left
from slimstep.prune.changes import Change, without_kept
from slimstep.prune.config import SearchConfig


def narrower_labels(unet: Prunable, shares: Sequence[float]) -> list[str]:
    """The labels of all parts of kept blocks at these shares, those of them that leave fewer units than there are; and
    at 0, where a part can be left out alone."""
    labels = []
    for block in (block for block in unet.kept_blocks if block in unet.width_units):
        present = unet.architecture.get(block, WHOLE).widths
        for part, units in unet.width_units[block].items():
            removable = part in unet.removable_parts[block]
            left = units_left(units, present.get(part, 1.0))
            for share in (*sorted(shares, reverse=True), *([0.0] if removable else [])):
                if (count := units_left(units, share)) < left:
                    labels.append(Change(block, part, share).label)
                    left = count
    return labels


def offered_narrower(unet: Prunable, search: SearchConfig) -> list[str]:
    """The labels of the narrower parts that a search may choose; none where search.actions does not say narrow."""
    return without_kept(narrower_labels(unet, search.widths), search.keep) if "narrow" in search.actions else []


def changed(
    unet: Prunable, labels: Sequence[str], draw: Callable[[list[int], Tensor | None], Tensor]
) -> Tensor:  # fmt: skip
    """What `draw(rows, block mask of these rows or None)` gives for every row after the change of its label, in their
    order: removals by a mask, all at once, and each narrowing by zeros in the weights, in place."""
    rows_of: dict[str | None, list[int]] = {}
    for row, label in enumerate(labels):
        rows_of.setdefault(label if Change.of(label).part else None, []).append(row)
    drawn: dict[int, Tensor] = {}
    for label, rows in rows_of.items():
        if label is None:
            columns = [unet.kept_blocks.index(labels[row]) for row in rows]
            mask_BN = torch.ones(len(rows), len(unet.kept_blocks), dtype=torch.bool)
            mask_BN[torch.arange(len(rows)), columns] = False
            found = draw(rows, mask_BN.to(unet.device))
        else:
            change = Change.of(label)
            with unet.with_narrower(change.block, change.part, change.share):
                found = draw(rows, None)
        drawn |= zip(rows, found, strict=True)
    return torch.stack([drawn[row] for row in range(len(labels))])
