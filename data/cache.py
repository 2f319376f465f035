"""Latents and text states, made once by the frozen VAE and text encoder and read from disk ever after.

A cache lives in FOLDER/<key>; the key hashes what made it: pairs, VAE, text encoder, tokenizer, storage. What lies in
it is told in `data/shards.py`. A killed caching goes on at the shard it was killed in.
"""

import fcntl
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.encoding import (
    at_work,
    encode_captions,
    encode_images,
    encode_nothing,
    is_truncated,
    module_hash,
    tokenizer_hash,
)
from data.folder import few
from data.pixels import BrokenImageError
from data.progress import progress
from data.shards import CachedPairs, cache_key, is_intact, shard_tensors, write_index, write_shard
from models.conditioning import text_encoders

__all__ = ["CachedPairs", "cache_pairs"]

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16}
log = logging.getLogger("slimstep")


def cache_pairs(
    pairs,
    pipeline,
    folder: str | Path,
    *,
    batch_size: int = 16,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    shard_size: int = 512,
    workers: int = 0,
    verify: bool = True,
    accelerator=None,
) -> CachedPairs:
    """Every image through the VAE (posterior mean, scaled) and every caption through the text encoder, once.

    Shard k is made by process k mod n of `accelerator`, in batches cut by index: the same bits for any number of
    processes. What lies intact under `folder`/<key> is not made again; `verify=False` trusts sizes instead of
    checksums. `dtype` is how numbers are stored ("float16" halves the files and rounds to 11 bits); reading gives
    float32 either way. `device` defaults to the accelerator's, else the pipeline's; `workers` processes read images.
    Raises ValueError for images of a size that VAE and UNet cannot take, for more broken images than
    `pairs.allowed_broken`, for encodings that are not finite, and for processes that see different data.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is no storage type; choose from {', '.join(DTYPES)}")
    if len(pairs) == 0:
        raise ValueError(f"the data set {pairs.fingerprint} holds no pairs")
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    made_from = _made_from(pairs, pipeline, dtype, shard_size)
    folder = Path(folder) / cache_key(made_from)
    agree(folder, world)
    folder.mkdir(parents=True, exist_ok=True)
    ranges = _cut(range(len(pairs)), shard_size)
    shards = {folder / f"shard-{k:05d}.safetensors": indices for k, indices in enumerate(ranges)}
    empty = folder / "empty.safetensors"
    with alone(folder / f".lock-{rank}"):
        missing = {path: shards[path] for path in list(shards)[rank::world] if not is_intact(path, verify)}
        no_empty = rank == 0 and not is_intact(empty, verify)
        if missing or no_empty:
            device = torch.device(device or (accelerator.device if accelerator else pipeline.device))
            maker = _Maker(pairs, pipeline, device, batch_size, DTYPES[dtype])
            with at_work(pipeline, device):
                if no_empty:
                    maker.write_empty(empty)
                maker.write_shards(missing, workers, show=rank == 0)
    _wait(accelerator)
    if rank == 0:
        with alone(folder / ".lock-0"):
            write_index(folder, made_from, list(shards))
    _wait(accelerator)
    cached = CachedPairs(folder)
    _check_broken(cached.broken, pairs)
    if rank == 0:
        _tell(cached)
    return cached


class _Maker:
    """Encodes pairs and writes shards."""

    def __init__(self, pairs, pipeline, device: torch.device, batch_size: int, dtype: torch.dtype) -> None:
        self.pairs, self.pipeline, self.device = pairs, pipeline, device
        self.batch_size, self.dtype = batch_size, dtype
        self.broken: list[str] = []

    def write_empty(self, path: Path) -> None:
        write_shard(path, shard_tensors({}, self._stored([encode_nothing(self.pipeline, self.device)]), [], [""]), {})

    def write_shards(self, ranges: dict[Path, range], workers: int, show: bool) -> None:
        batches = {path: _cut(indices, self.batch_size) for path, indices in ranges.items()}
        loader = DataLoader(
            _Tolerant(self.pairs),
            batch_sampler=[batch for of_shard in batches.values() for batch in of_shard],
            num_workers=workers,
            collate_fn=list,
            generator=torch.Generator(),  # without it the iterator would draw from the global random state
        )
        total = sum(map(len, ranges.values()))
        with progress(total=total, desc="caching latents and texts", unit="image", disable=not show) as bar:
            loaded = iter(loader)
            for path, of_shard in batches.items():
                self._write_one(path, islice(loaded, len(of_shard)), bar)

    def _write_one(self, path: Path, batches: Iterator[list], bar) -> None:
        latents, indices, captions, broken = [], [], [], []
        for batch in batches:
            sound = [item for item in batch if isinstance(item, dict)]
            broken += [str(item) for item in batch if isinstance(item, BrokenImageError)]
            if sound:
                images = torch.stack([item["image"] for item in sound])
                latents.append(encode_images(self.pipeline, images, self.device))
            indices += [item["index"] for item in sound]
            captions += [item["caption"] for item in sound]
            bar.update(len(batch))
        self.broken += broken
        _check_broken(self.broken, self.pairs)
        if not indices:
            raise ValueError(f"none of {len(broken)} neighbouring images can be read; the first: {broken[0]}")
        distinct = list(dict.fromkeys(captions))
        texts = [encode_captions(self.pipeline, some, self.device) for some in _cut(distinct, self.batch_size)]
        cut = {caption for caption in distinct if is_truncated(self.pipeline.tokenizer, caption)}
        record = {"samples": len(indices), "truncated": sum(c in cut for c in captions), "broken": broken}
        write_shard(path, shard_tensors(self._stored(latents), self._stored(texts), indices, captions), record)

    def _stored(self, encoded: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in encoded]).cpu().to(self.dtype) for name in encoded[0]}


class _Tolerant(Dataset):
    """The pairs with their index; a broken image is returned as its error, not raised: the cache counts them."""

    def __init__(self, pairs) -> None:
        self.pairs = pairs

    def __getitem__(self, index: int) -> dict | BrokenImageError:
        try:
            return {**self.pairs[index], "index": index}
        except BrokenImageError as error:
            return error


def _made_from(pairs, pipeline, dtype: str, shard_size: int) -> dict[str, str | int]:
    told = {"told_size": pipeline.unet.config.sample_size} if len(text_encoders(pipeline)) > 1 else {}
    return {
        **told,
        "format": FORMAT,
        "pairs": pairs.fingerprint,
        "num_pairs": len(pairs),
        "vae": module_hash(pipeline.vae),
        **text_hashes(pipeline),
        "dtype": dtype,
        "shard_size": shard_size,
    }


def text_hashes(pipeline) -> dict[str, str]:
    """What text states depend on beside the captions."""
    zeros = pipeline.config.get("force_zeros_for_empty_prompt")
    hashes = {} if zeros is None else {"zeros_for_empty_prompt": str(zeros)}
    for number in ("", "_2") if len(text_encoders(pipeline)) > 1 else ("",):
        hashes[f"text_encoder{number}"] = module_hash(getattr(pipeline, f"text_encoder{number}"))
        hashes[f"tokenizer{number}"] = tokenizer_hash(getattr(pipeline, f"tokenizer{number}"))
    return hashes


def agree(folder: Path, world: int) -> None:
    if world == 1:
        return
    from accelerate.utils import gather_object

    seen = gather_object([str(folder)])
    if len(set(seen)) > 1:
        raise ValueError(f"the processes see different data or weights, so their caches differ: {', '.join(seen)}")


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """A second job over the same data waits here, and then finds the shards made; a killed one leaves no lock."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wait(accelerator) -> None:
    if accelerator:
        accelerator.wait_for_everyone()


def _cut(sequence: Sequence, size: int) -> list[Sequence]:
    return [sequence[start : start + size] for start in range(0, len(sequence), size)]


def _check_broken(broken: list[str], pairs) -> None:
    allowed = getattr(pairs, "allowed_broken", 0)
    if len(broken) > allowed:
        raise ValueError(
            f"{len(broken)} of {len(pairs)} images cannot be read and at most {allowed} may be skipped: "
            f"{few(broken)}; repair or delete them, or raise data.max_broken"
        )


def _tell(cached: CachedPairs) -> None:
    if cached.broken:
        log.warning("%d broken images are skipped: %s", len(cached.broken), few(cached.broken))
    if cached.truncated:
        log.warning("%d of %d captions exceed the text encoder's length and are cut", cached.truncated, len(cached))
