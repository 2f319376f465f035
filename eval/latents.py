"""Latents that a pipeline samples from prompts, made once and cached: what a decoder is going to meet.

Axes: B batch, C channels, H and W latent size. What is written BCHW is BCFHW of videos.
"""

from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import count as count_up
from itertools import takewhile
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from slimstep.data.cache import agree, alone, first_frame_hashes, text_hashes
from slimstep.data.encoding import module_hash
from slimstep.data.prompts import PromptSet
from slimstep.data.shards import CachedPairs, cache_key, is_intact, shard_tensors, write_index, write_shard
from slimstep.engine.progress import progress
from slimstep.eval.sampling import Sampler
from slimstep.models.first_frames import begins_with_frame, first_frames

FORMAT = 1


def sampled_latents(
    sampler: Sampler, unet: nn.Module, prompts: PromptSet, count: int, batch_size: int, folder: Path, accelerator
) -> CachedPairs:
    """`count` or more items {"latents": [C, H, W]}; latent i is prompt i mod P, from its own noise.

    Shard k holds batch k, sampled by process k mod n: the same bits for any number of processes. What lies intact under
    `folder/<key>` is not made again, and a larger count adds to it. Raises ValueError for latents that are not finite.
    """
    settings = {name: str(value) for name, value in sampler.protocol.items()}
    if settings["precision"] == "float32":
        del settings["precision"]  # as of caches that were made before there was a choice
    made_from: dict[str, Any] = {
        "format": FORMAT,
        "unet": module_hash(unet),
        **text_hashes(sampler.pipeline),
        "scheduler": cache_key({k: v for k, v in sampler.scheduler.config.items() if not k.startswith("_")}),
        **settings,
        **frames_hashes(sampler.pipeline, prompts),
        "prompts": prompts.hash,
        "batch_size": batch_size,
    }
    folder = Path(folder) / f"latents-{cache_key(made_from)}"
    rank, world = accelerator.process_index, accelerator.num_processes
    agree(folder, world)
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(shard_paths(folder, range(-(-count // batch_size))))
    with alone(folder / f".lock-{rank}"), sampler.encoding():
        missing = [k for k in range(rank, len(shards), world) if not is_intact(shards[k], verify=True)]
        for k in progress(missing, desc="sampling latents", unit="batch", disable=rank > 0 or not missing):
            indices = list(range(k * batch_size, (k + 1) * batch_size))
            cond = sampler.encode_rows(prompts.prompts, [i % len(prompts) for i in indices])
            latents_BCHW = sampler.of_video(sampler.latents_at(unet, cond, indices)).float()
            record = {"samples": len(indices), "truncated": 0, "broken": []}
            captions = [""] * len(indices)
            write_shard(shards[k], shard_tensors({"latents": latents_BCHW.cpu()}, {}, indices, captions), record)
    accelerator.wait_for_everyone()
    if rank == 0:
        with alone(folder / ".lock-0"):  # there may be more, of another run
            whole = takewhile(lambda path: path.with_suffix(".json").exists(), shard_paths(folder, count_up()))
            write_index(folder, made_from, list(whole))
    accelerator.wait_for_everyone()
    return CachedPairs(folder)


def frames_hashes(pipeline: DiffusionPipeline, prompts: PromptSet) -> dict[str, Any]:
    """What the conditions by first frames depend on beside their names; nothing of models that begin without."""
    if not begins_with_frame(pipeline):
        return {}
    frames = sha256()
    for frame in first_frames(pipeline, prompts.distinct):
        frames.update(frame.numpy().tobytes())
    return {"vae": module_hash(pipeline.vae), "first_frames": frames.hexdigest(), **first_frame_hashes(pipeline)}


def shard_paths(folder: Path, numbers: Iterable[int]) -> Iterator[Path]:
    return (folder / f"shard-{k:05d}.safetensors" for k in numbers)
