"""Data sets that are read front to back and never held: tars, parquet files, the hub's shards.

A stream is made of parts. A part yields its samples in order, from any position that it has named before, so parts go
to processes by number and work goes on where it was killed. `data/stream_cache.py` encodes one; training then reads the
cache in any order.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from slimstep.data.folder import few
from slimstep.data.images import allowed_of, check_split, is_held_out
from slimstep.data.pixels import BrokenImageError, check_framing, cut_out, decode_rgb
from slimstep.engine.resolution import Resolution
from slimstep.engine.seeding import generator

log = logging.getLogger("slimstep")
FEWEST_CHECKED, SLACK = 1000, 5  # before the end, a share of broken samples is that of as many, and may be so much more


@dataclass(frozen=True)
class Entry:
    """One sample as it is stored, from position `start` of its part up to `end`; `flaw` says why it is none.

    `image` is undecoded, and None where it was not asked for. Without a `key` it is the part itself that is flawed.
    """

    key: str | None
    name: str
    start: int
    end: int
    image: bytes | None = None
    caption: str | None = None
    flaw: str | None = None

    @property
    def complaint(self) -> str:
        return f"{self.name} ({self.flaw})"


class Pairs(Protocol):
    """Images with captions at random access; a method `caption(index)` gives one without its image, if there is one."""

    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(eq=False)
class Stream(ABC):
    """What all streams share. A subclass gives `parts`, the names; `fingerprint`; and `read`.

    `split` "heldout" holds the samples whose key hashes into `heldout_fraction`, "train" the others, "all" both. Where
    `image_column` or `caption_column` is None, it is found by itself.
    """

    source: str | list[str]
    resolution: Resolution
    split: str = "train"
    heldout_fraction: float = 0.1
    image_column: str | None = None
    caption_column: str | None = None
    crop: str = "center"
    max_broken: float = 0.01
    parts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        check_framing(self.resolution, self.crop)
        check_split(self.split, self.heldout_fraction)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes with what the source holds, and with what of it is taken, and how."""

    @property
    def taken(self) -> list:
        """What of the source is taken, and how."""
        columns = [self.image_column, self.caption_column]
        return [self.split, self.heldout_fraction, *columns, self.resolution, self.crop]

    @abstractmethod
    def read(self, part: int, start: int, images: bool = True) -> Iterator[Entry]:
        """The entries of a part from position `start` on, all splits'. Without `images` captions alone are read."""

    def wants(self, entry: Entry) -> bool:
        """Whether the entry belongs to the split; a part that is flawed itself concerns all."""
        if entry.key is None or self.split == "all":
            return True
        return is_held_out(entry.key, self.heldout_fraction) == (self.split == "heldout")

    def sample(self, entry: Entry) -> dict[str, Tensor | str]:
        """{"image": uint8 [3, H, W] of the resolution, "caption": str}. Raises BrokenImageError."""
        if entry.flaw:
            raise BrokenImageError(entry.complaint)
        image = cut_out(decode_rgb(entry.image, entry.name), self.resolution, self.crop, entry.key)
        return {"image": image, "caption": entry.caption}

    def scan(self, images: bool) -> Iterator[Entry]:
        """The sound entries of the split, part by part in a fixed shuffled order. Raises ValueError where too many
        are broken."""
        seen, flaws = 0, []
        for part in torch.randperm(len(self.parts), generator=generator("parts")).tolist():
            for entry in filter(self.wants, self.read(part, 0, images)):
                seen += 1
                if entry.flaw:
                    flaws.append(entry.complaint)
                    self.check_broken(flaws, seen, so_far=True)
                else:
                    yield entry
        self.check_broken(flaws, seen)

    def check_broken(self, broken: list[str], seen: int, so_far: bool = False) -> None:
        """ValueError where more of `seen` samples are broken than `max_broken` allows.

        Broken samples come in runs, so a share is checked at the end; `so_far` only far above it.
        """
        checked = SLACK * max(seen, FEWEST_CHECKED) if so_far and self.max_broken < 1 else seen
        if len(broken) > (allowed := allowed_of(checked, self.max_broken)):
            of = f"{len(broken)} of {seen} samples{' so far' if so_far else ''} cannot be used"
            message = f"data.max_broken={self.max_broken} skips {allowed}"
            raise ValueError(f"{of}, and {message}: {few(broken)}; repair them, or raise data.max_broken")


def readable(pairs: Pairs, order: str, tell: bool = True) -> Iterator[Mapping[str, Any]]:
    """The samples that can be read, in the fixed shuffled order of this name; the others are logged."""
    for index in torch.randperm(len(pairs), generator=generator(order)).tolist():
        try:
            yield pairs[index]
        except BrokenImageError as error:
            if tell:
                log.warning(f"left out: {error}")


class FirstSamples:
    """The first `count` samples that a scan of a stream meets, kept as they are stored, at random access."""

    def __init__(self, stream: Stream, count: int) -> None:
        self.stream, self.entries = stream, list(islice(stream.scan(images=True), count))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        return self.stream.sample(self.entries[index])


def at_random_access(pairs, count: int):
    """`pairs` themselves; of a stream, which has no random access, its first `count` samples."""
    return FirstSamples(pairs, count) if isinstance(pairs, Stream) else pairs
