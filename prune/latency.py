"""The latency table: milliseconds each block costs inside the running network, and how far the entries add up.

On a GPU an entry is the whole denoiser minus that without the block, each a CUDA graph (CUDA events, interleaved,
medians): launched kernel by kernel, two blocks of as many kernels cost alike. On a CPU such differences drown in noise:
there an entry is the thread's CPU time spent inside the block of the running network, less what its skip rule costs.
Blocks run alone are never timed: launch gaps, fusion and concatenations do not add up. What the other changes of
changes.py save (a narrower part, int8, merged tokens) is measured by real surgery in the same ways: on a CPU the time
inside the block of the whole network minus that of one in which every block has one such change, the two in turns. It
may be less than nothing, as of int8 where kernels are small; such a change is never taken.
"""

import itertools
import json
import math
import statistics
import time
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from slimstep.models.architecture import WHOLE, holds
from slimstep.models.families.prunable import Prunable
from slimstep.models.sizes import latent_size
from slimstep.prune.changes import Change, changes_in


def read_table(path: str | Path) -> dict:
    """A table that latency_table made, perhaps on the device the student is for. Raises ValueError for what is none."""
    try:
        table = json.loads(Path(path).read_text())
        blocks = {block: {**entry, "ms": float(entry["ms"])} for block, entry in table["sites"].items()}
        narrower = {label: {**entry, "ms": float(entry["ms"])} for label, entry in table.get("narrower", {}).items()}
        full_ms = float(table["full_ms"])
    except OSError as error:
        raise ValueError(f"latency.table={path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"latency.table={path} is no latency table; +experiment=latency_table makes one") from error
    times = [full_ms, *(entry["ms"] for entry in (*blocks.values(), *narrower.values()))]
    if not all(map(math.isfinite, times)) or full_ms <= 0:
        raise ValueError(f"latency.table={path} holds times that are not finite, or a full_ms that is not above 0")
    return {**table, "full_ms": full_ms, "sites": blocks, "narrower": narrower}


def table_without(table: dict, unet: Prunable, narrower: Sequence[str] = ()) -> dict:
    """What a table of a whole denoiser says of a pruned one: entries of the kept blocks, the rest off `full_ms`; of the
    labels `narrower` what each saves further. ValueError for a table that lacks some of them."""
    if unknown := [block for block in unet.kept_blocks if block not in table["sites"]]:
        raise ValueError(f"latency.table has no entry for {unknown}: it was made for another denoiser")
    entries = {block: unet.repeats(block) * block_ms(table, unet, block) for block in unet.kept_blocks}
    narrowed = {label: narrowing_ms(table, unet, label) for label in narrower}
    as_entries = lambda times: {name: {"ms": ms} for name, ms in times.items()}  # noqa: E731
    full_ms = predicted_ms(table, unet)
    return {**table, "full_ms": full_ms, "sites": as_entries(entries), "narrower": as_entries(narrowed)}


def block_ms(table: dict, unet: Prunable, block: str) -> float:
    """What one run of a block takes, changed as it is. ValueError for changes whose times do not add up."""
    changes = changes_in(block, unet.architecture.get(block, WHOLE))
    if mixed := [one.label for one in changes if any(one.excludes(other) for other in changes if other != one)]:
        raise ValueError(f"latency.table cannot say what {' and '.join(mixed)} save together; measure, without it")
    return table["sites"][block]["ms"] - sum(saved_ms(table, change) for change in changes)


def saved_ms(table: dict, change: Change) -> float:
    """What a change saves of the whole block's time; ValueError where the table does not say so."""
    if (entry := table.get("narrower", {}).get(change.label)) is None:
        own = {"narrow": "widths", "quantize": "dtypes", "merge": "merge"}[change.action]
        made = f"+experiment=latency_table makes one with search.actions=[remove,{change.action}] and search.{own}"
        raise ValueError(f"latency.table has no entry for {change.label}; {made} as here")
    return entry["ms"]


def narrowing_ms(table: dict, unet: Prunable, label: str) -> float:
    """What a change saves in all runs of its block, whose part may be narrower, or merge tokens, already."""
    change = Change.of(label)
    present = changes_in(change.block, unet.architecture.get(change.block, WHOLE))
    before = sum(saved_ms(table, other) for other in present if other.part == change.part)
    return unet.repeats(change.block) * (saved_ms(table, change) - before)


def predicted_ms(table: dict, unet: Prunable) -> float:
    """The whole time, less the entries of removed blocks and of other changes, plus those of copies."""
    removed = {block for block in table["sites"] if unet.repeats(block) == 0}
    # A layer within a removed transformer went with it, and is not counted twice.
    counted = [s for s in table["sites"] if not any(holds(holder, s) for holder in removed)]
    changes = (unet.repeats(s) * block_ms(table, unet, s) - table["sites"][s]["ms"] for s in counted)
    return table["full_ms"] + sum(changes)


def latency_table(
    unet: Prunable, config: LatencyConfig, device: torch.device, narrower: Sequence[str] = ()
) -> dict:  # fmt: skip
    """A JSON-ready table of the kept blocks, and of the changes with the labels `narrower`, in milliseconds;
    `additive_error` is relative to the measured time, over random removals, among them such changes."""
    unet = timed_copy(unet, config, device)
    config = settled_launch(unet, config, device)
    method = method_of(config, device)
    with one_thread(device):
        in_place = method == "in_place_hooks"
        full_ms, block_ms = (in_place_times if in_place else difference_times)(unet, config)
        narrower_ms = (in_place_savings if in_place else difference_savings)(unet, config, narrower)
        samples = random_architectures(unet, full_ms, {**block_ms, **narrower_ms}, config)
    errors = sorted(abs(s["predicted_ms"] - s["measured_ms"]) / s["measured_ms"] for s in samples)
    return {
        "method": method,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "dtype": config.dtype,
        "batch": config.batch,
        "latent_size": config.latent_size or latent_size(unet, WAY),
        "mode": "compiled" if config.compile else "eager",
        "threads": 1 if device.type == "cpu" else None,
        "torch": torch.__version__,
        "full_ms": full_ms,
        "sites": {block: {"ms": ms} for block, ms in block_ms.items()},
        **({"narrower": {label: {"ms": ms} for label, ms in narrower_ms.items()}} if narrower else {}),
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


def difference_savings(unet: Prunable, config: LatencyConfig, labels: Sequence[str]) -> dict[str, float]:
    """Per label, latency(full) − latency(with this change), interleaved."""
    saved = {}
    for label in progress(labels, desc="changed blocks", unit="change"):
        after = unet.with_architecture(Change.of(label).applied_to(unet.architecture))
        times = paired_ms(unet, after, config, desc=label)
        saved[label] = times["full"] - times["pruned"]
    return saved


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


def in_place_savings(unet: Prunable, config: LatencyConfig, labels: Sequence[str]) -> dict[str, float]:
    """Per label, the median CPU time inside the block less that inside the changed one, of networks that run in turns:
    each has one label of every block that has so many."""
    places = [Change.of(label).block for label in labels]
    turns = [places[:n].count(block) for n, block in enumerate(places)]  # how many labels of its block are before it
    saved: dict[str, float] = {}
    for turn in progress(range(max(turns, default=-1) + 1), desc="changed blocks", unit="denoiser"):
        own = {Change.of(label): label for label, at in zip(labels, turns, strict=True) if at == turn}
        architecture = unet.architecture
        for change in own:
            architecture = change.applied_to(architecture)
        networks = {"whole": unet, "changed": unet.with_architecture(architecture)}
        calls = {name: forward_call(network, config) for name, network in networks.items()}
        _, iterations = affordable(sum(warm_up_ms(call, unet.device) for call in calls.values()), config)
        inside: dict[Hashable, list[float]] = {}
        with ExitStack() as stack:
            for name, network in networks.items():
                modules = {(name, change.block, path, n): module for change in own
                           for path in network.instances(change.block)
                           for n, module in enumerate(network.modules_of(path))}  # fmt: skip
                inside |= {place: [] for place in modules}
                stack.enter_context(timing_hooks(modules, inside))
            for _, call in itertools.product(range(iterations), calls.values()):
                call()
        for change, label in own.items():
            times = {name: sum(statistics.median(taken) for place, taken in inside.items()
                               if place[:2] == (name, change.block)) for name in networks}  # fmt: skip
            saved[label] = times["whole"] - times["changed"]
    return {label: saved[label] for label in labels}


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


def random_architectures(
    unet: Prunable, full_ms: float, saved_ms: Mapping[str, float], config: LatencyConfig
) -> list[dict]:  # fmt: skip
    """Random architectures with 2 … 3/4 of the blocks changed: what the table predicts and what is measured.

    saved_ms: by label. A block with other changes is removed in one case of two, and has one of these in the others.
    """
    draw = generator("removals", config.seed)
    samples, blocks = [], list(unet.kept_blocks)
    parts = {block: [label for label in saved_ms if label.startswith(f"{block}:")] for block in blocks}

    def one_of(labels: Sequence[str]) -> str:
        return labels[int(torch.randint(len(labels), (), generator=draw))]

    for _ in progress(range(config.additive_samples), desc="additive error", unit="denoiser"):
        count = int(torch.randint(2, max(3, 3 * len(blocks) // 4), (), generator=draw))
        order = [blocks[i] for i in torch.randperm(len(blocks), generator=draw)][:count]
        labels = [one_of([block, one_of(parts[block])]) if parts[block] else block for block in order]
        # A layer within a removed transformer goes with it, and is not counted twice.
        changes = {label: Change.of(label) for label in labels}
        labels = [n for n, change in changes.items() if not any(holds(other, change.block) for other in labels)]
        architecture = unet.architecture
        for label in labels:
            architecture = changes[label].applied_to(architecture)
        times = paired_ms(unet, unet.with_architecture(architecture), config, desc=f"{len(labels)} changed")
        # Against the full model of the same minute: drift between samples is not the table's error.
        predicted = times["full"] * (1 - sum(saved_ms[label] for label in labels) / full_ms)
        samples.append({"removed": labels, "predicted_ms": predicted, "measured_ms": times["pruned"]})
    return samples
