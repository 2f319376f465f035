"""Timing whole denoisers: interleaved medians, CUDA events on a GPU, the calling thread's CPU time elsewhere.

On a GPU a network is a CUDA graph where it can be captured. Launched kernel by kernel, small ones end before the host
has launched the next: what is timed is then their number.
"""

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from slimstep.engine.progress import progress
from slimstep.engine.seeding import generator
from slimstep.eval.config import LatencyConfig
from slimstep.eval.timing.graphs import CannotCaptureError, CapturedCall
from slimstep.models.denoiser import NUM_TOKENS
from slimstep.models.families.prunable import Prunable
from slimstep.models.family import denoiser_of
from slimstep.models.sizes import latent_size

WAY = "latency.latent_size=N"
log = logging.getLogger("slimstep")


def compare_ms(unets: Mapping[str, Prunable], config: LatencyConfig, device: torch.device) -> dict[str, float]:
    """Median milliseconds of whole denoisers, interleaved call by call so that drift hits all alike."""
    copies = {name: timed_copy(unet, config, device) for name, unet in unets.items()}
    config = settled_launch(next(iter(copies.values())), config, device)  # all alike
    calls = {name: forward_call(unet, config) for name, unet in copies.items()}
    with one_thread(device):
        return interleaved_ms(calls, config, device)


def timed_copy(unet: Prunable, config: LatencyConfig, device: torch.device):
    """A copy of the denoiser as it will run: on the device, in the dtype, without gradients."""
    dtype = getattr(torch, config.dtype)
    return unet.with_architecture({}).to(device=device, dtype=dtype).eval().requires_grad_(False)


def settled_launch(unet: Prunable, config: LatencyConfig, device: torch.device) -> LatencyConfig:
    """The configuration with `cuda_graph` true or false: the former by default where the network can be captured.

    Raises ValueError where it is true already and cannot be.
    """
    if config.cuda_graph and device.type != "cuda":
        raise ValueError(f"latency.cuda_graph=true needs a CUDA device, and this is {device}; leave it out")
    if config.cuda_graph is False or device.type != "cuda":
        return replace(config, cuda_graph=False)
    try:
        forward_call(unet, replace(config, cuda_graph=True))
    except CannotCaptureError as error:
        if config.cuda_graph:
            raise ValueError(f"latency.cuda_graph=true: the network cannot be captured: {error}") from error
        log.warning(f"the network cannot be captured as a CUDA graph, and is timed kernel by kernel: {error}")
        return replace(config, cuda_graph=False)
    return replace(config, cuda_graph=True)


def forward_call(unet: Prunable, config: LatencyConfig) -> Callable[[], None]:
    """A call of the denoiser on random inputs of the configured shape.

    Raises CannotCaptureError where it is to be a CUDA graph and cannot.
    """
    denoiser, draw = denoiser_of(unet), generator("latency", config.seed)
    if not config.latent_size:
        latent_size(unet, WAY)  # ValueError where it has none
    shape = {"side": config.latent_size or None, "tokens": config.text_length or NUM_TOKENS}
    inputs = denoiser.example(unet, config.batch, **shape, generator=draw)
    if config.compile:
        torch.compiler.reset()  # every network is its own graph; more than eight of one class would be refused
    run = torch.compile(unet, fullgraph=True) if config.compile else unet

    def call() -> None:
        with torch.inference_mode():
            denoiser(run, *inputs)

    return CapturedCall(call) if config.cuda_graph else call


def interleaved_ms(
    calls: Mapping[str, Callable[[], None]], config: LatencyConfig, device: torch.device, desc: str = "timing"
) -> dict[str, float]:
    """The median time of each call."""
    return {name: statistics.median(times) for name, times in interleaved_times(calls, config, device, desc).items()}


def interleaved_times(
    calls: Mapping[str, Callable[[], None]], config: LatencyConfig, device: torch.device, desc: str = "timing"
) -> dict[str, list[float]]:
    """All milliseconds of each call: CUDA events on a GPU, the calling thread's CPU time elsewhere."""
    clock = cuda_ms if device.type == "cuda" else thread_ms
    times: dict[str, list[float]] = {name: [] for name in calls}
    warmup, iterations = affordable(sum(warm_up_ms(call, device) for call in calls.values()), config)
    for call in calls.values():
        for _ in range(warmup):
            call()
    for i in progress(range(iterations), desc=desc, leave=False):
        for name in list(calls) if i % 2 == 0 else reversed(calls):  # A B B A
            times[name].append(clock(calls[name]))
    return times


def warm_up_ms(call: Callable[[], None], device: torch.device) -> float:
    """Wall time of a second call; the first may compile."""
    wall_ms(call, device)
    return wall_ms(call, device)


def wall_ms(call: Callable[[], None], device: torch.device) -> float:
    """Wall time of a call, until the device has finished it."""
    finished = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    finished()
    start = time.perf_counter()
    call()
    finished()
    return 1e3 * (time.perf_counter() - start)


def affordable(call_ms: float, config: LatencyConfig) -> tuple[int, int]:
    """Warm-up calls and timed calls that fit `config.seconds`: as many as asked for, at least 0 and 3."""
    calls = int(1e3 * config.seconds / call_ms)
    iterations = min(config.iterations, max(3, calls))
    return min(config.warmup, max(0, calls - iterations)), iterations


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
