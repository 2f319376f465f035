"""A stream's cache: every part is read once, front to back, into shards of its own.

    part-00003-00002.safetensors, .json    the third shard of part 3; its record says at which position the part goes on

Nothing of a stream is held but the samples of the shard that is being made.
"""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from slimstep.data.making import ShardMaker, cut
from slimstep.data.pixels import BrokenImageError
from slimstep.data.shards import is_intact
from slimstep.data.streams import Entry, Stream
from slimstep.engine.progress import progress

log = logging.getLogger("slimstep")
INDEX_BITS = 40  # of a sample's index hold its position, the others the part
TAKEN_BYTES = 1 << 30  # of encoded images are held at once, at most about as many


class PartShards:
    """The shards of a stream's parts under `folder`, at most `size` samples each."""

    def __init__(self, stream: Stream, folder: Path, size: int) -> None:
        self.stream, self.folder, self.size = stream, folder, size

    def paths(self) -> list[Path]:
        """The shards of all parts, each part's from its first on. ValueError where one is gone since it was made."""
        paths = []
        for part in range(len(self.stream.parts)):
            shards, whole = self._of_part(part, verify=False)
            if not whole:
                raise ValueError(f"{self._path(part, len(shards))} was made, and is gone or damaged: start again")
            paths += shards
        return paths

    def missing(self, rank: int, world: int, verify: bool) -> list[int]:
        """The parts of this process that are not all there."""
        if rank == 0 and world > (parts := len(self.stream.parts)):
            log.warning("%d parts for %d processes: %d of them have nothing to encode", parts, world, world - parts)
        return [k for k in range(rank, len(self.stream.parts), world) if not self._of_part(k, verify)[1]]

    def make(self, missing: list[int], maker: ShardMaker, workers: int, verify: bool, show: bool) -> None:
        bar = progress(desc="caching latents and texts", unit="image", disable=not show)
        with bar, Decoder(workers) as decoder:
            for part in missing:
                self._make_part(part, maker, decoder, verify, bar)

    def check_broken(self, broken: list[str], samples: int) -> None:
        """ValueError where the finished cache lacks more samples than may be skipped, or holds none."""
        self.stream.check_broken(broken, samples + len(broken))
        if not samples:
            raise ValueError(
                f"the {self.stream.split} split of {len(self.stream.parts)} parts from {self.stream.parts[0]} on holds "
                "no samples; look at data.source and data.heldout_fraction"
            )

    def _path(self, part: int, number: int) -> Path:
        return self.folder / f"part-{part:05d}-{number:05d}.safetensors"

    def _of_part(self, part: int, verify: bool) -> tuple[list[Path], bool]:
        """The intact shards of a part, up to the first that is not, and whether they are all of it."""
        shards, position = [], 0
        while position is not None:
            path = self._path(part, len(shards))
            if not is_intact(path, verify):
                return shards, False
            shards.append(path)
            position = goes_on_at(path)
        return shards, True

    def _make_part(self, part: int, maker: ShardMaker, decoder: "Decoder", verify: bool, bar) -> None:
        def check(broken: list[str]) -> None:
            self.stream.check_broken(broken, maker.encoded + len(broken), so_far=True)

        position, reading = 0, None
        for number in count():
            path = self._path(part, number)
            if is_intact(path, verify):
                position, reading = goes_on_at(path), None
            else:
                reading = reading or self.stream.read(part, position)
                taken, position = take(self.stream, reading, self.size)
                check(maker.broken + [entry.complaint for entry in taken if entry.flaw])
                batches = decoder.batches(self.stream, part, taken, maker.batch_size)
                torn = sum(entry.key is None for entry in taken)
                maker.write(path, batches, bar, check, {"end": position, "torn": torn})
            if position is None:
                return


def goes_on_at(shard: Path) -> int | None:
    """The position in the part that follows a shard; None after its last."""
    return json.loads(shard.with_suffix(".json").read_text())["end"]


def take(stream: Stream, reading: Iterator[Entry], size: int) -> tuple[list[Entry], int | None]:
    """The next `size` entries of the split, fewer of large ones, and where the part goes on; None where it ends."""
    taken, held = [], 0
    for entry in reading:
        if stream.wants(entry):
            taken.append(entry)
            held += len(entry.image) if isinstance(entry.image, bytes) else 0
            if len(taken) == size or held >= TAKEN_BYTES:
                return taken, entry.end
    return taken, None


class Decoder:
    """Threads that decode the next batch while one is encoded; without any, decoding waits its turn."""

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers) if workers else None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def batches(self, stream: Stream, part: int, entries: list[Entry], size: int) -> Iterator[list]:
        """Lists of samples with their "index", or the BrokenImageError that an entry is."""

        def decoded(entry: Entry) -> dict | BrokenImageError:
            try:
                return {**stream.sample(entry), "index": part << INDEX_BITS | entry.start}
            except BrokenImageError as error:
                return error

        map_one, ahead = (self._pool.map if self._pool else map), None
        for batch in cut(entries, size):
            begun = map_one(decoded, batch)  # in threads from now on
            if ahead is not None:
                yield list(ahead)
            ahead = begun
        if ahead is not None:
            yield list(ahead)
