"""What compiling costs: the cold-start latency with nothing kept, with saved artefacts, with a kept cache.

The compiled graphs of a process serve others of the same torch and device (`torch.compiler.save_cache_artifacts`). On
a CPU they hold no C++ kernels, which are built again: there the kept cache directory is what saves time.
"""

import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import slimstep
from slimstep.engine.files import write_bytes
from slimstep.eval.timing.child import child_result
from slimstep.eval.timing.inference import CannotRunError, InferenceConfig
from slimstep.eval.timing.speed import TimedPipeline
from slimstep.models.first_frames import with_first_frames
from slimstep.models.networks import network_of
from slimstep.models.pipeline import load_pipeline, with_unet
from slimstep.models.sizes import set_frames, set_resolution

log = logging.getLogger("slimstep")
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
STEADY_CALLS = 3


def load_artifacts(path: Path) -> None:
    """Compiled graphs of an earlier process, for this one. What another torch or device made is not used by torch."""
    torch.compiler.load_cache_artifacts(path.read_bytes())


def save_artifacts(path: Path) -> int:
    """Writes what this process has compiled; returns its bytes, 0 where there is nothing."""
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        return 0
    write_bytes(path, saved[0])
    return len(saved[0])


def compile_first(path: Path, compile_it: Callable[[], None], accelerator: Accelerator) -> None:
    """Rank 0 compiles, with the artefacts that an earlier process has left at `path`, or leaves them there; then the
    others load them."""
    for first in (True, False):
        if accelerator.is_main_process == first:
            if existing := path.exists():
                load_artifacts(path)
            compile_it()
            if first and not existing:
                save_artifacts(path)
        accelerator.wait_for_everyone()


def compile_cost(request: Mapping[str, Any], artifacts: Path) -> dict[str, Any]:
    """Seconds to the first image in new processes, and the break-even calls of compiling.

    `request` holds a BenchmarkCase's fields, those of a TimedPipeline, a file of first frames or None, and
    load_pipeline's options for every model. The artefacts stay at `artifacts`. `calls` is None where compiled calls are
    not faster than eager ones, or eager ones could not run. A way whose process failed is {"cannot": why}; None is one
    that was not tried for want of the first.
    """
    plain = {**request, "inference": {**request["inference"], "compile": "eager"}}
    with tempfile.TemporaryDirectory() as kept, tempfile.TemporaryDirectory() as empty:
        eager = new_process(plain, Path(kept) / "eager")
        cold, warm, loaded = new_process({**request, "save": str(artifacts)}, Path(kept)), None, None
        if "cannot" not in cold:
            warm = new_process(request, Path(kept))
            loaded = new_process({**request, "load": str(artifacts)}, Path(empty)) if artifacts.exists() else None
    ways = {"cold": cold, "artifacts": loaded, "kept_cache": warm}
    return {"eager": eager, **{name: way and with_calls(way, eager, cold) for name, way in ways.items()}}


def with_calls(way: Mapping[str, Any], eager: Mapping[str, Any], cold: Mapping[str, Any]) -> dict[str, Any]:
    """`way`, with its break-even calls."""
    if "cannot" in way:
        return dict(way)
    gained_s = 1e-3 * (eager["steady_ms"] - cold["steady_ms"]) if "cannot" not in eager else 0.0
    return {**way, "calls": (way["first_s"] - eager["first_s"]) / gained_s if gained_s > 0 else None}


def new_process(request: Mapping[str, Any], cache: Path) -> dict[str, Any]:
    """One measurement with its compiler caches in this folder; {"cannot": why} where it could not be made."""
    caches = {name: str(cache / name.lower()) for name in CACHES}
    try:
        return child_result(
            [sys.executable, "-m", "slimstep.eval.timing.cold_start"],
            input=json.dumps(request), cwd=Path(slimstep.__file__).parents[1], env={**os.environ, **caches},
        )  # fmt: skip
    except CannotRunError as error:
        log.warning(f"compiling in a new process: {error}")
        return {"cannot": str(error)}


def main() -> None:
    """The measurement that standard input asks for; a JSON line on standard output."""
    request = json.load(sys.stdin)
    device = torch.device(request["device"])
    if device.type == "cpu":
        torch.set_num_threads(1)  # as all is timed here

    def load(where: str) -> DiffusionPipeline:
        loaded = load_pipeline(where, **request["options"][where])
        if request["resolution"]:
            set_resolution(loaded, request["resolution"])
        if request["frames"]:
            set_frames(loaded, request["frames"])
        return loaded

    pipeline = load(request["model"])
    network = network_of(load(request["unet"]) if request["unet"] else pipeline)
    vae = {"vae": load(request["vae"]).vae} if request["vae"] else {}
    pipeline = with_unet(pipeline, network, **vae)
    if request["first_frames"]:
        with_first_frames(pipeline, load_file(request["first_frames"]))
    if "load" in request:
        load_artifacts(Path(request["load"]))
    kwargs = {key: request[key] for key in ("prompts", "steps", "guidance_scale", "batch", "seed")}
    timed = TimedPipeline(pipeline, InferenceConfig(**request["inference"]), device=device, **kwargs)
    times = []
    for _ in range(1 + STEADY_CALLS):
        start = time.perf_counter()
        timed.call()
        times.append(time.perf_counter() - start)
    size = save_artifacts(Path(request["save"])) if "save" in request else None
    steady_ms = 1e3 * statistics.median(times[1:])
    print(json.dumps({"first_s": times[0], "steady_ms": steady_ms, "artifact_bytes": size}))


if __name__ == "__main__":
    main()
