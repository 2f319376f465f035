"""The latency table: milliseconds each block costs inside the running network, and how far the entries add up.

On a GPU an entry is the whole denoiser minus that without the block, each a CUDA graph (CUDA events, interleaved,
medians): launched kernel by kernel, two blocks of as many kernels cost alike. On a CPU such differences drown in noise:
there an entry is the thread's CPU time spent inside the block of the running network, less what its skip rule costs.
Blocks run alone are never timed: launch gaps, fusion and concatenations do not add up.
"""

import json
import math
import statistics
import time
from collections.abc import Hashable, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from slimstep.engine.environment import cpu_name
from slimstep.engine.progress import progress
from slimstep.engine.seeding import generator
from slimstep.eval.config import LatencyConfig
from slimstep.eval.timing.latency import (
    WAY,
    affordable,
    forward_call,
    interleaved_ms,
    one_thread,
    settled_launch,
    thread_ms,
    timed_copy,
    warm_up_ms,
)
from slimstep.models.architecture import holds
from slimstep.models.families.prunable import Prunable
from slimstep.models.sizes import latent_side


def read_table(path: str | Path) -> dict:
    """A table that latency_table made, perhaps on the device the student is for. Raises ValueError for what is none."""
    try:
        table = json.loads(Path(path).read_text())
        blocks = {block: {**entry, "ms": float(entry["ms"])} for block, entry in table["sites"].items()}
        full_ms = float(table["full_ms"])
    except OSError as error:
        raise ValueError(f"latency.table={path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"latency.table={path} is no latency table; +experiment=latency_table makes one") from error
    if not all(map(math.isfinite, (full_ms, *(entry["ms"] for entry in blocks.values())))) or full_ms <= 0:
        raise ValueError(f"latency.table={path} holds times that are not finite, or a full_ms that is not above 0")
    return {**table, "full_ms": full_ms, "sites": blocks}


def table_without(table: dict, unet: Prunable) -> dict:
    """What a table of a whole denoiser says of a pruned one: entries of the kept blocks, the rest off `full_ms`."""
    if unknown := [block for block in unet.kept_blocks if block not in table["sites"]]:
        raise ValueError(f"latency.table has no entry for {unknown}: it was made for another denoiser")
    entries = {block: unet.repeats(block) * table["sites"][block]["ms"] for block in unet.kept_blocks}
    full_ms = predicted_ms(table, unet)
    return {**table, "full_ms": full_ms, "sites": {block: {"ms": ms} for block, ms in entries.items()}}


def predicted_ms(table: dict, unet: Prunable) -> float:
    """The whole time, less the entries of removed blocks, plus those of copies."""
    removed = {block for block in table["sites"] if unet.repeats(block) == 0}
    # A layer within a removed transformer went with it, and is not counted twice.
    counted = [s for s in table["sites"] if not any(holds(holder, s) for holder in removed)]
    return table["full_ms"] + sum((unet.repeats(block) - 1) * table["sites"][block]["ms"] for block in counted)


def latency_table(unet: Prunable, config: LatencyConfig, device: torch.device) -> dict:
    """A JSON-ready table of the kept blocks, in milliseconds; `additive_error` is relative to the measured time."""
    unet = timed_copy(unet, config, device)
    config = settled_launch(unet, config, device)
    method = method_of(config, device)
    with one_thread(device):
        timed = in_place_times if method == "in_place_hooks" else difference_times
        full_ms, block_ms = timed(unet, config)
        samples = random_removals(unet, full_ms, block_ms, config)
    errors = sorted(abs(s["predicted_ms"] - s["measured_ms"]) / s["measured_ms"] for s in samples)
    return {
        "method": method,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "dtype": config.dtype,
        "batch": config.batch,
        "latent_size": config.latent_size or latent_side(unet, WAY),
        "mode": "compiled" if config.compile else "eager",
        "threads": 1 if device.type == "cpu" else None,
        "torch": torch.__version__,
        "full_ms": full_ms,
        "sites": {block: {"ms": ms} for block, ms in block_ms.items()},
        "additive_error": {
            "n": len(errors),
            "median": statistics.median(errors),
            "p95": errors[min(len(errors) - 1, int(0.95 * len(errors)))],
        },
        "samples": samples,
    }


def method_of(config: LatencyConfig, device: torch.device) -> str:
    """What is timed: whole networks, as CUDA graphs or launched kernel by kernel, or blocks of a running one."""
    if device.type == "cuda":
        return "difference_of_cuda_graphs" if config.cuda_graph else "difference_of_launches"
    return "difference" if config.compile else "in_place_hooks"  # a hook inside a compiled graph would break it


def difference_times(unet: Prunable, config: LatencyConfig) -> tuple[float, dict[str, float]]:
    """Per block, latency(full) − latency(without it), interleaved; the full time is the median over all pairs."""
    full, saved = {}, {}
    for block in progress(unet.kept_blocks, desc="latency table", unit="block"):
        pruned = unet.with_architecture({block: 0})
        times = paired_ms(unet, pruned, config, desc=block)
        full[block], saved[block] = times["full"], times["full"] - times["pruned"]
    return statistics.median(full.values()), saved


def paired_ms(unet, pruned, config: LatencyConfig, desc: str) -> dict[str, float]:
    """The two networks' medians as `full` and `pruned`, interleaved."""
    calls = {"full": forward_call(unet, config), "pruned": forward_call(pruned, config)}
    return interleaved_ms(calls, config, unet.device, desc)


def in_place_times(unet: Prunable, config: LatencyConfig) -> tuple[float, dict[str, float]]:
    """Per block, the median CPU time between entering and leaving it, less the time in what its skip rule keeps."""
    timed = {
        (path, n): (block, module) for block in unet.kept_blocks for path in unet.instances(block)
        for n, module in enumerate(unet.modules_of(path))
    }  # fmt: skip
    rules = {block: unet.skip_rules.get(block) for block in unet.kept_blocks}
    kept = {block: timed[block, 0][1].conv_shortcut for block, rule in rules.items() if rule == "shortcut"}
    inside = {place: [] for place in timed}
    beside = {block: [] for block in kept}
    whole: list[float] = []
    call = forward_call(unet, config)
    _, iterations = affordable(warm_up_ms(call, unet.device), config)
    with timing_hooks({place: module for place, (_, module) in timed.items()}, inside), timing_hooks(kept, beside):
        for _ in progress(range(iterations), desc="latency table"):
            whole.append(thread_ms(call))
    medians = dict.fromkeys(unet.kept_blocks, 0.0)
    for place, (block, _) in timed.items():
        medians[block] += statistics.median(inside[place])
    for block, times in beside.items():
        medians[block] -= statistics.median(times)
    return statistics.median(whole), medians


@contextmanager
def timing_hooks(modules: Mapping[Hashable, nn.Module], times: Mapping[Hashable, list[float]]):
    """Appends the milliseconds of CPU time spent in each module's forward while the block runs."""
    started: dict[Hashable, float] = {}
    handles = []
    for name, module in modules.items():

        def enter(module, args, kwargs, name=name):
            started[name] = time.thread_time()

        def leave(module, args, output, name=name):
            times[name].append(1e3 * (time.thread_time() - started[name]))

        handles += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def random_removals(unet: Prunable, full_ms: float, block_ms: Mapping[str, float], config: LatencyConfig) -> list[dict]:
    """Random architectures with 2 … 3/4 of the blocks gone: what the table predicts and what is measured."""
    draw = generator("removals", config.seed)
    samples, blocks = [], list(unet.kept_blocks)
    for _ in progress(range(config.additive_samples), desc="additive error", unit="denoiser"):
        count = int(torch.randint(2, max(3, 3 * len(blocks) // 4), (), generator=draw))
        order = [blocks[i] for i in torch.randperm(len(blocks), generator=draw)]
        # A layer within a removed transformer goes with it, and is not counted twice.
        removed = [s for s in order[:count] if not any(holds(other, s) for other in order[:count])]
        pruned = unet.with_architecture(dict.fromkeys(removed, 0))
        times = paired_ms(unet, pruned, config, desc=f"{len(removed)} removed")
        # Against the full model of the same minute: drift between samples is not the table's error.
        predicted = times["full"] * (1 - sum(block_ms[block] for block in removed) / full_ms)
        samples.append({"removed": removed, "predicted_ms": predicted, "measured_ms": times["pruned"]})
    return samples
