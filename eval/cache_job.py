"""The caching job: latents and text states of the configured data, made before anything trains on them."""

import math
from pathlib import Path

from slimstep.data.cache import described_cache
from slimstep.data.encoding import at_work, check_size, encode_nothing
from slimstep.data.shards import DTYPES, CachedPairs, cache_key, is_intact
from slimstep.data.streams import Stream
from slimstep.engine.components import component
from slimstep.engine.planning import Plan
from slimstep.engine.resolution import sides
from slimstep.engine.run import Run
from slimstep.eval.config import Config
from slimstep.eval.inputs import Teacher, check_data, check_weights, load_teacher, storage, training_data
from slimstep.eval.pages.text import size
from slimstep.models.conditioning import TEXT_MASK
from slimstep.models.family import denoiser_of
from slimstep.models.networks import network_of


def cache_latents(config: Config, run: Run) -> int | Plan:
    """Makes the cache, or goes on with it, or tells what it would be; returns exit code 0.

    Any job of the same data and model finds it. Raises ValueError for data or a model that cannot be had.
    """
    teacher = load_teacher(config, run)
    check_weights(teacher.pipeline, config)  # a plan's, too: a cache is named by them
    check_data(teacher)
    check_size(teacher.pipeline, *sides(teacher.config.data.resolution))
    if config.plan:
        return planned(teacher)
    summary = made(training_data(teacher))
    if run.accelerator.is_main_process:
        print(summary)
    return 0


def planned(teacher: Teacher) -> Plan:
    """Where the cache would lie, how many samples it would have, how much disk they take, and what of it is there."""
    options, pairs = storage(teacher.config), component(teacher.config, "data.pairs")
    made_from = described_cache(pairs, teacher.pipeline, options.dtype, options.shard_size)
    folder = Path(options.folder) / cache_key(made_from)
    existing = [path for path in folder.glob("*-*.safetensors") if is_intact(path, verify=False)]
    latents, text, has_mask = sample_bytes(teacher)
    masked = ", and of their text states those of the mask alone" if has_mask else ""
    if isinstance(pairs, Stream):
        samples, total = f"not known before they are read, in {len(pairs.parts)} parts", ""
    else:
        samples, total = f"{len(pairs):,}", f"{size(len(pairs) * (latents + text))} at most, "
    return Plan("\n".join([
        f"cache      {folder}",
        f"samples    {samples}",
        f"disk       {total}{size(1_000_000 * (latents + text))} a million: {size(latents)} an image, {size(text)} "
        f"a caption in {options.dtype}; captions that a shard repeats are kept once{masked}",
        f"there      {len(existing)} shards, {size(sum(path.stat().st_size for path in existing))}",
    ]))  # fmt: skip


def sample_bytes(teacher: Teacher) -> tuple[int, int, bool]:
    """Bytes of the latents of an image, and of the conditioning of a caption of full length; whether it has a mask."""
    pipeline, one = teacher.pipeline, DTYPES[storage(teacher.config).dtype].itemsize
    with at_work(pipeline, teacher.device):
        tensors = encode_nothing(pipeline, teacher.device).tensors
    shape = denoiser_of(network_of(pipeline)).sample_shape
    return one * math.prod(shape), one * sum(x.numel() for x in tensors.values()), TEXT_MASK in tensors


def made(cached: CachedPairs) -> str:
    """Where the cache lies and what is in it."""
    disk = sum(path.stat().st_size for path in cached.folder.iterdir())
    return "\n".join([
        f"cache      {cached.folder.resolve()}",
        f"samples    {len(cached):,}; broken and skipped {len(cached.broken):,}; captions cut {cached.truncated:,}",
        f"disk       {size(disk)}",
    ])  # fmt: skip
