"""Latents and conditioning, made once by the frozen VAE and text encoder and read from disk ever after.

A cache lives in `FOLDER/<key>`; the key hashes what made it: pairs, VAE, text encoder, tokenizer, storage. What lies in
it is written in `data/shards.py`. A killed caching goes on at the shard it was killed in.
"""

import fcntl
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from slimstep.data.encoding import at_work, module_hash, tokenizer_hash
from slimstep.data.folder import few
from slimstep.data.making import ShardMaker
from slimstep.data.range_cache import RangeShards
from slimstep.data.shards import DTYPES, CachedPairs, cache_key, is_intact, write_index
from slimstep.data.stream_cache import PartShards
from slimstep.data.streams import Stream
from slimstep.models.decoding import STATISTICS, has_statistics, is_tiled
from slimstep.models.family import family_of
from slimstep.models.first_frames import begins_with_frame, video_options
from slimstep.models.networks import network_of, sequence_length, text_encoders

FORMAT = 1
# Beside it in the key of a cache of SDXL, whose captions have a size; PACKED where all was in rows of the text states.
SIZED, PACKED = "conditioning_of_size", "told_size"
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

    Shard k of pairs at random access is made by process k mod n of `accelerator`, part k of a stream by process
    k mod n, in batches that do not depend on n: the same bits for any number of processes. What lies intact under
    `folder/<key>` is not made again; `verify=False` trusts sizes instead of checksums. `dtype` is how numbers are
    stored ("float16" halves the files and rounds to 11 bits); reading gives float32 either way. `device` defaults to
    the accelerator's, else the pipeline's; `workers` processes (threads for a stream) decode images.
    Raises ValueError for images of a size that VAE and UNet cannot take, for more broken images than the pairs allow,
    for encodings that are not finite, and for processes that see different data.
    """
    made_from = described_cache(pairs, pipeline, dtype, shard_size)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    folder = Path(folder) / cache_key(made_from)
    agree(folder, world)
    folder.mkdir(parents=True, exist_ok=True)
    cut = PartShards if isinstance(pairs, Stream) else RangeShards
    shards, empty = cut(pairs, folder, shard_size), folder / "empty.safetensors"
    with alone(folder / ".lock") if rank == 0 else nullcontext():
        if rank == 0:
            _tell_old_form(made_from, folder)
        _wait(accelerator)  # for rank 0, which may have waited for another job
        missing = shards.missing(rank, world, verify)
        no_empty = rank == 0 and not is_intact(empty, verify)
        if missing or no_empty:
            device = torch.device(device or (accelerator.device if accelerator else pipeline.device))
            maker, began = ShardMaker(pipeline, device, batch_size, DTYPES[dtype]), time.perf_counter()
            with at_work(pipeline, device):
                if no_empty:
                    maker.write_empty(empty)
                shards.make(missing, maker, workers, verify, show=rank == 0)
            seconds, by = time.perf_counter() - began, " by this process" if world > 1 else ""
            speed = f"{maker.encoded / seconds:.1f} a second"
            log.info(f"{maker.encoded} images and captions encoded{by} in {seconds:.1f} s, {speed}")
        _wait(accelerator)
        if rank == 0:
            write_index(folder, made_from, shards.paths())
    _wait(accelerator)
    cached = CachedPairs(folder)
    shards.check_broken(cached.broken, len(cached))
    if rank == 0:
        _tell(cached)
    return cached


def described_cache(pairs, pipeline, dtype: str, shard_size: int) -> dict[str, str | int]:
    """What makes a cache, and names it. Raises ValueError for another `dtype` and for no pairs."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is no storage type; choose from {', '.join(DTYPES)}")
    counted = {} if isinstance(pairs, Stream) else {"num_pairs": len(pairs)}
    if counted.get("num_pairs") == 0:
        raise ValueError(f"the data set {pairs.fingerprint} holds no pairs")
    sized = {SIZED: network_of(pipeline).config.get("sample_size")} if len(text_encoders(pipeline)) > 1 else {}
    cut = {"max_sequence_length": length} if (length := sequence_length(pipeline)) else {}
    padded = {"patch_size_t": size} if (size := network_of(pipeline).config.get("patch_size_t")) else {}
    return {
        **sized,
        **cut,
        **padded,
        **scale_of_latents(pipeline),
        "format": FORMAT,
        "pairs": pairs.fingerprint,
        **counted,
        "vae": module_hash(codec) if (codec := family_of(pipeline).codec(pipeline)) else "none: pixels",
        **({"vae_tiling": True} if is_tiled(codec) else {}),
        **text_hashes(pipeline),
        **first_frame_hashes(pipeline),
        "dtype": dtype,
        "shard_size": shard_size,
    }


def scale_of_latents(pipeline) -> dict[str, str]:
    """What latents are scaled by, where that is more than `scaling_factor`, or once was."""
    if (codec := family_of(pipeline).codec(pipeline)) is None:
        return {}
    config = codec.config
    used = has_statistics(pipeline)
    if used and config.get(STATISTICS[0]) is not None:
        return {"statistics": str([list(config[name]) for name in STATISTICS])} | (
            {"shift_factor": "unused"} if config.get("shift_factor") else {}
        )
    return {"shift_factor": str(config.shift_factor) if used else "unused"} if config.get("shift_factor") else {}


def text_hashes(pipeline) -> dict[str, str]:
    """What text states depend on beside the captions."""
    zeros = pipeline.config.get("force_zeros_for_empty_prompt")
    hashes = {} if zeros is None else {"zeros_for_empty_prompt": str(zeros)}
    for part, encoder in text_encoders(pipeline).items():
        tokenizer = part.replace("text_encoder", "tokenizer")
        hashes |= {part: module_hash(encoder), tokenizer: tokenizer_hash(getattr(pipeline, tokenizer))}
    return hashes


def first_frame_hashes(pipeline) -> dict[str, str]:
    """What the conditions by a first frame depend on beside it."""
    if not begins_with_frame(pipeline):
        return {}
    if family_of(pipeline).PART != "unet":
        return {"first_frame": f"a draw of the posterior, noise {video_options(pipeline).noise_aug_strength:g}"}
    extractor = json.dumps(pipeline.feature_extractor.to_dict(), sort_keys=True, default=str)
    time_ids = str(video_options(pipeline).time_ids)
    return {"image_encoder": module_hash(pipeline.image_encoder), "feature_extractor": extractor, "time_ids": time_ids}


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


def _tell_old_form(made_from: dict[str, str | int], folder: Path) -> None:
    """One line where a cache of the same is there that packs SDXL's pooled states into the text states."""
    if SIZED in made_from and not (folder / "index.json").exists():
        old = {PACKED if key == SIZED else key: value for key, value in made_from.items()}
        if (packed := folder.parent / cache_key(old)).exists():
            log.info(f"the cache {packed} is of an earlier form, and is made again; nothing reads it any more")


def _tell(cached: CachedPairs) -> None:
    if cached.broken:
        log.warning("%d broken images are skipped: %s", len(cached.broken), few(cached.broken))
    if cached.torn:
        log.warning("%d of them are torn tars: what lies beyond the tear is not there", cached.torn)
    if cached.truncated:
        log.warning("%d of %d captions exceed the text encoder's length and are cut", cached.truncated, len(cached))
