"""The latency table: milliseconds each block costs inside the running network, and how far the entries add up.

On a GPU an entry is the whole UNet minus the UNet without the block (CUDA events, interleaved, medians). On a CPU such
differences drown in noise: there an entry is the thread's CPU time spent inside the block of the running network, less
what its bypass still costs. Blocks run alone are never timed: launch gaps, fusion and concatenations do not add up.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from data.progress import progress
from data.seeding import generator
from engine.environment import cpu_name
from models.unet import PrunableUNet2DConditionModel


@dataclass(frozen=True)
class LatencyConfig:
    """How the UNet is timed. `batch` counts UNet rows: 2 is one guided image. `latent_size` 0 is the UNet's own."""

    batch: int = 2
    latent_size: int = 0
    text_length: int = 77
    compile: bool = False
    dtype: str = "float32"
    warmup: int = 5
    iterations: int = 40
    additive_samples: int = 20
    seed: int = 0


def latency_table(unet: PrunableUNet2DConditionModel, config: LatencyConfig, device: torch.device) -> dict:
    """A JSON-ready table of the UNet's kept sites, in milliseconds; `additive_error` is relative to the measured time.

    Raises ValueError for an unknown dtype.
    """
    unet = timed_copy(unet, config, device)
    with one_thread(device):
        if device.type == "cuda":
            method, (full_ms, site_ms) = "difference", difference_times(unet, config)
        else:
            method, (full_ms, site_ms) = "in_place_hooks", in_place_times(unet, config)
        samples = random_removals(unet, full_ms, site_ms, config)
    errors = sorted(abs(s["predicted_ms"] - s["measured_ms"]) / s["measured_ms"] for s in samples)
    return {
        "method": method,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "dtype": config.dtype,
        "batch": config.batch,
        "latent_size": config.latent_size or unet.config.sample_size,
        "mode": "compiled" if config.compile else "eager",
        "threads": 1 if device.type == "cpu" else None,
        "torch": torch.__version__,
        "full_ms": full_ms,
        "sites": {site: {"ms": ms} for site, ms in site_ms.items()},
        "additive_error": {
            "n": len(errors),
            "median": statistics.median(errors),
            "p95": errors[min(len(errors) - 1, int(0.95 * len(errors)))],
        },
        "samples": samples,
    }


def compare_ms(
    unets: Mapping[str, PrunableUNet2DConditionModel], config: LatencyConfig, device: torch.device
) -> dict[str, float]:
    """Median milliseconds of whole UNets, interleaved call by call so that drift hits all alike."""
    calls = {name: forward_call(timed_copy(unet, config, device), config) for name, unet in unets.items()}
    with one_thread(device):
        return interleaved_ms(calls, config, device)


def timed_copy(unet: PrunableUNet2DConditionModel, config: LatencyConfig, device: torch.device):
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if config.dtype not in dtypes:
        raise ValueError(f"latency.dtype={config.dtype!r} is unknown; choose from {list(dtypes)}")
    return unet.with_depths({}).to(device=device, dtype=dtypes[config.dtype]).eval().requires_grad_(False)


def forward_call(unet: PrunableUNet2DConditionModel, config: LatencyConfig) -> Callable[[], None]:
    """A call of the UNet on random inputs of the configured shape."""
    size = config.latent_size or unet.config.sample_size
    like = {"device": unet.device, "dtype": unet.dtype}
    draw = generator("latency", config.seed)
    shapes = {"sample": (config.batch, unet.config.in_channels, size, size),
              "encoder_hidden_states": (config.batch, config.text_length, unet.config.cross_attention_dim)}  # fmt: skip
    inputs = {name: torch.randn(shape, generator=draw).to(**like) for name, shape in shapes.items()}
    inputs["timestep"] = torch.full((config.batch,), 500, device=unet.device)
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(config.batch, pooled, generator=draw).to(**like)}
        inputs["added_cond_kwargs"] = {**added, "time_ids": torch.zeros(config.batch, 6).to(**like)}
    run = torch.compile(unet, fullgraph=True) if config.compile else unet

    def call() -> None:
        with torch.inference_mode():
            run(**inputs, return_dict=False)

    return call


def interleaved_ms(
    calls: Mapping[str, Callable[[], None]], config: LatencyConfig, device: torch.device, desc: str = "timing"
) -> dict[str, float]:
    """The median time of each call: CUDA events on a GPU, the calling thread's CPU time elsewhere."""
    clock = cuda_ms if device.type == "cuda" else thread_ms
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(config.warmup):
            call()
    for i in progress(range(config.iterations), desc=desc, leave=False):
        for name in list(calls) if i % 2 == 0 else reversed(calls):  # A B B A
            times[name].append(clock(calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def thread_ms(call: Callable[[], None]) -> float:
    start = time.thread_time()
    call()
    return 1e3 * (time.thread_time() - start)


def cuda_ms(call: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def difference_times(unet: PrunableUNet2DConditionModel, config: LatencyConfig) -> tuple[float, dict[str, float]]:
    """Per site, latency(full) − latency(without it), interleaved; the full time is the median over all pairs."""
    full, saved = {}, {}
    for site in progress(unet.kept_sites, desc="latency table", unit="block"):
        pruned = unet.with_depths({site: 0})
        calls = {"full": forward_call(unet, config), "pruned": forward_call(pruned, config)}
        times = interleaved_ms(calls, config, unet.device, desc=site)
        full[site], saved[site] = times["full"], times["full"] - times["pruned"]
    return statistics.median(full.values()), saved


def in_place_times(unet: PrunableUNet2DConditionModel, config: LatencyConfig) -> tuple[float, dict[str, float]]:
    """Per site, the median CPU time between entering and leaving it, less the time in what its bypass would keep."""
    timed = {site: unet.get_submodule(site) for site in unet.kept_sites}
    bypass = {site: module.conv_shortcut for site, module in timed.items() if unet.bypass.get(site) == "shortcut"}
    inside = {site: [] for site in timed}
    bypassed = {site: [] for site in bypass}
    whole: list[float] = []
    call = forward_call(unet, config)
    with timing_hooks(timed, inside), timing_hooks(bypass, bypassed):
        for i in progress(range(config.warmup + config.iterations), desc="latency table"):
            if i == config.warmup:
                for times in (*inside.values(), *bypassed.values(), whole):
                    times.clear()
            whole.append(thread_ms(call))
    medians = {site: statistics.median(times) for site, times in inside.items()}
    for site, times in bypassed.items():
        medians[site] -= statistics.median(times)
    return statistics.median(whole), medians


@contextmanager
def timing_hooks(modules: Mapping[str, nn.Module], times: dict[str, list[float]]):
    """Appends the milliseconds of CPU time spent in each module's forward while the block runs."""
    started: dict[str, float] = {}
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


def random_removals(
    unet: PrunableUNet2DConditionModel, full_ms: float, site_ms: Mapping[str, float], config: LatencyConfig
) -> list[dict]:
    """Random architectures with 2 … 3/4 of the blocks gone: what the table predicts and what is measured."""
    draw = generator("removals", config.seed)
    samples, sites = [], list(unet.kept_sites)
    for _ in progress(range(config.additive_samples), desc="additive error", unit="UNet"):
        count = int(torch.randint(2, max(3, 3 * len(sites) // 4), (), generator=draw))
        order = [sites[i] for i in torch.randperm(len(sites), generator=draw)]
        removed = outermost(order[:count])
        pruned = unet.with_depths(dict.fromkeys(removed, 0))
        calls = {"full": forward_call(unet, config), "pruned": forward_call(pruned, config)}
        times = interleaved_ms(calls, config, unet.device, desc=f"{len(removed)} removed")
        # Against the full model of the same minute: drift between samples is not the table's error.
        predicted = times["full"] * (1 - sum(site_ms[site] for site in removed) / full_ms)
        samples.append({"removed": removed, "predicted_ms": predicted, "measured_ms": times["pruned"]})
    return samples


def outermost(sites: list[str]) -> list[str]:
    """`sites` without those that lie within another of them (SDXL's transformer layers)."""
    return [site for site in sites if not any(site.startswith(f"{other}.") for other in sites)]


@contextmanager
def one_thread(device: torch.device):
    """CPU times are those of one thread: waiting for others would count as work."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
