"""The cache of pairs at random access: shard k holds the pairs k·size to (k + 1)·size - 1."""

from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from slimstep.data.folder import few
from slimstep.data.making import ShardMaker, cut
from slimstep.data.pixels import BrokenImageError
from slimstep.data.shards import is_intact
from slimstep.engine.progress import progress


class RangeShards:
    """The shards that `pairs` are cut into by index, under `folder`."""

    def __init__(self, pairs, folder: Path, size: int) -> None:
        self.pairs = pairs
        ranges = cut(range(len(pairs)), size)
        self.ranges = {folder / f"shard-{k:05d}.safetensors": indices for k, indices in enumerate(ranges)}

    def paths(self) -> list[Path]:
        return list(self.ranges)

    def missing(self, rank: int, world: int, verify: bool) -> list[Path]:
        """The shards of this process that are not intact."""
        return [path for path in self.paths()[rank::world] if not is_intact(path, verify)]

    def make(self, missing: list[Path], maker: ShardMaker, workers: int, verify: bool, show: bool) -> None:
        batches = {path: cut(self.ranges[path], maker.batch_size) for path in missing}
        loader = DataLoader(
            _Tolerant(self.pairs),
            batch_sampler=[batch for of_shard in batches.values() for batch in of_shard],
            num_workers=workers,
            collate_fn=list,
            generator=torch.Generator(),  # without it the iterator would draw from the global random state
        )
        total = sum(len(self.ranges[path]) for path in missing)
        with progress(total=total, desc="caching latents and texts", unit="image", disable=not show) as bar:
            loaded = iter(loader)
            for path, of_shard in batches.items():
                maker.write(path, islice(loaded, len(of_shard)), bar, self._check, {})

    def _check(self, broken: list[str]) -> None:
        allowed = getattr(self.pairs, "allowed_broken", 0)
        if len(broken) > allowed:
            raise ValueError(
                f"{len(broken)} of {len(self.pairs)} images cannot be read and at most {allowed} may be skipped: "
                f"{few(broken)}; repair or delete them, or raise data.max_broken"
            )

    def check_broken(self, broken: list[str], samples: int) -> None:
        """ValueError where the finished cache lacks more images than may be skipped, or holds none."""
        self._check(broken)
        if not samples:
            raise ValueError(f"none of {len(self.pairs)} images can be read; the first: {broken[0]}")


class _Tolerant(Dataset):
    """The pairs with their index; a broken image is returned as its error, not raised: the cache counts them."""

    def __init__(self, pairs) -> None:
        self.pairs = pairs

    def __getitem__(self, index: int) -> dict | BrokenImageError:
        try:
            return {**self.pairs[index], "index": index}
        except BrokenImageError as error:
            return error
