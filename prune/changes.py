"""What a search may do to a block beside copying it: remove it, narrow a part of it (families/widths.py), compute its
linear layers in int8 or fp8 (families/quantized.py), or merge tokens in its self-attention (families/merged.py).

A change is named by a label, as files and configurations have it: `mid_block.resnets.0`, the removal,
`mid_block.attentions.0:ff@0.5`, half of the hidden channels of its feed-forward, `mid_block.attentions.0:dtype@int8`,
or `mid_block.attentions.0:merge@0.5`. A share of a part is one of the whole network's width, and 0 leaves the part out
alone; one of `merge` is that of the tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self

from slimstep.models.architecture import (
    Architecture,
    BlockSpec,
    action_on,
    narrowed,
    nested,
    remove,
    with_dtype,
    with_merge,
)

DTYPE, MERGE = "dtype", "merge"  # in the place of a part
MERGING = "attn1"  # the part whose time merging changes


@dataclass(frozen=True)
class Change:
    """Of a block, or of one part of it. share: what is left of the part; the dtype, or the share of merged tokens."""

    block: str
    part: str | None = None
    share: float | str = 0.0

    @classmethod
    def of(cls, label: str) -> Self:
        block, _, rest = label.partition(":")
        part, _, share = rest.partition("@")
        return cls(block, part, share if part == DTYPE else float(share)) if rest else cls(block)

    @property
    def label(self) -> str:
        if not self.part:
            return self.block
        share = self.share if isinstance(self.share, str) else f"{self.share:g}"
        return f"{self.block}:{self.part}@{share}"

    @property
    def action(self) -> str:
        """What a search's record calls it."""
        return action_on(self.part)

    @property
    def place(self) -> str | None:
        """The part of the block that takes another time after it; None for all of it."""
        if self.part in (None, DTYPE):
            return None
        return MERGING if self.part == MERGE else self.part

    def excludes(self, other: "Change") -> bool:
        """Whether the two cannot be taken together: one holds what the other is of, or they change the time of one
        part. Of such changes neither milliseconds nor losses add up: half of a feed-forward in int8 saves less than
        what the two save alone."""
        if self.block == other.block:
            return self.place is None or other.place is None or self.place == other.place
        return nested(self.block, other.block)

    def applied_to(self, architecture: Architecture) -> Architecture:
        if self.part is None:
            return remove(architecture, self.block)
        ways = {DTYPE: with_dtype, MERGE: with_merge}
        if self.part in ways:
            return ways[self.part](architecture, self.block, self.share)
        return narrowed(architecture, self.block, self.part, self.share)


def changes_in(block: str, spec: BlockSpec) -> list[Change]:
    """What makes the whole block one with this entry, but for removing and copying it."""
    changes = [Change(block, part, share) for part, share in spec.widths.items()]
    changes += [Change(block, DTYPE, spec.dtype)] if spec.dtype else []
    return changes + ([Change(block, MERGE, spec.merge)] if spec.merge else [])


def without_kept(labels: Iterable[str], keep: Sequence[str]) -> list[str]:
    """The labels of blocks that no pattern of `keep` names."""
    return [label for label in labels if not any(fnmatchcase(Change.of(label).block, pattern) for pattern in keep)]
