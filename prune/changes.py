"""What a search may do to a block beside copying it: remove it, or narrow a part of it (families/widths.py).

A change is named by a label, as files and configurations have it: `mid_block.resnets.0`, the removal, or
`mid_block.attentions.0:ff@0.5`, half of the hidden channels of its feed-forward. A share is one of the whole network's
width, and 0 leaves a part out alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self

from slimstep.models.architecture import Architecture, narrowed, nested, remove


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


def without_kept(labels: Iterable[str], keep: Sequence[str]) -> list[str]:
    """The labels of blocks that no pattern of `keep` names."""
    return [label for label in labels if not any(fnmatchcase(Change.of(label).block, pattern) for pattern in keep)]
