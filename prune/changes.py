"""What a search may do to a block beside copying it: remove it, or narrow a part of it (families/widths.py).

A change is named by a label, as files and configurations have it: `mid_block.resnets.0`, the removal, or
`mid_block.attentions.0:ff@0.5`, half of the hidden channels of its feed-forward. A share is one of the whole network's
width, and 0 leaves a part out alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self

import torch
from torch import Tensor

from slimstep.models.architecture import WHOLE, Architecture, narrowed, nested, remove
from slimstep.models.families.prunable import Prunable
from slimstep.models.families.widths import units_left


@dataclass(frozen=True)
class Change:
    """Of a block, or of one part of it."""

    block: str
    part: str | None = None
    share: float = 0.0

    @classmethod
    def of(cls, label: str) -> Self:
        block, _, rest = label.partition(":")
        part, _, share = rest.partition("@")
        return cls(block, part, float(share)) if rest else cls(block)

    @property
    def label(self) -> str:
        return f"{self.block}:{self.part}@{self.share:g}" if self.part else self.block

    def excludes(self, other: "Change") -> bool:
        """Whether the two cannot be taken together: one holds what the other is of, or they are of one part."""
        if self.block == other.block:
            return self.part is None or other.part is None or self.part == other.part
        return nested(self.block, other.block)

    def applied_to(self, architecture: Architecture) -> Architecture:
        if self.part is None:
            return remove(architecture, self.block)
        return narrowed(architecture, self.block, self.part, self.share)


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


def without_kept(labels: Iterable[str], keep: Sequence[str]) -> list[str]:
    """The labels of blocks that no pattern of `keep` names."""
    return [label for label in labels if not any(fnmatchcase(Change.of(label).block, pattern) for pattern in keep)]


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
