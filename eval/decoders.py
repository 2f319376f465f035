"""Comparing VAE decoders: how long each takes, eager and compiled."""

import copy
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slimstep.engine.resolution import Resolution, printed, sides
from slimstep.eval.config import LatencyConfig
from slimstep.eval.timing.latency import interleaved_times, one_thread
from slimstep.models.decoding import decoder_of, latent_channels
from slimstep.models.pipeline import quiet


def decoder_gflops(vae: ModelMixin, latent_size: Resolution, latent_frames: int | None = None) -> float:
    """10⁹ floating point operations of decoding one image, or so many latents of a video, of this size."""
    with quiet(), torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta = type(vae).from_config(dict(vae.config)).to("meta")  # diffusers makes what blends frames on the CPU
        decoder_of(on_meta)(torch.empty(latents_shape(vae, 1, latent_size, latent_frames)))
    return counter.get_total_flops() / 1e9


def compare_decoders(
    vaes: Mapping[str, ModelMixin],
    sizes: Sequence[Resolution],
    batches: Sequence[int],
    config: LatencyConfig,
    device: torch.device,
    latent_frames: int | None = None,
) -> list[dict[str, Any]]:
    """Per mode, latent size and batch: each decoder's median ms, and the ratio of the first's to the last's; of videos,
    for so many latents behind each other, which are decoded together.

    Calls are interleaved; the ratio is the median over pairs of calls, with its quartiles. `of_flops` is the share of
    the ratio of floating point operations that has become time. A case that does not fit says so. Eager; with
    `config.compile` compiled as well.
    """
    teacher, pruned = list(vaes)[0], list(vaes)[-1]
    flops = {size: {name: decoder_gflops(vae, size, latent_frames) for name, vae in vaes.items()} for size in sizes}
    rows = []
    for mode, size, batch in product(("eager", "compiled") if config.compile else ("eager",), sizes, batches):
        of_video = {"latent_frames": latent_frames} if latent_frames else {}
        case = {"mode": mode, "latent_size": size, "batch": batch, **of_video}
        z = torch.randn(latents_shape(next(iter(vaes.values())), batch, size, latent_frames))
        try:
            calls = {name: decode_call(vae, z, config, device, mode) for name, vae in vaes.items()}
            with one_thread(device):
                times = interleaved_times(calls, config, device, f"decoders, {mode}, {printed(size)}, batch {batch}")
        except torch.OutOfMemoryError:
            rows.append({**case, "skipped": "out of memory"})
            continue
        ratios = [a / b for a, b in zip(times[teacher], times[pruned], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        flop_ratio = flops[size][teacher] / flops[size][pruned]
        rows.append({
            **case, "ms": {name: statistics.median(values) for name, values in times.items()},
            "gflops": flops[size], "ratio": middle, "low": low, "high": high, "n": len(ratios),
            "flop_ratio": flop_ratio, "of_flops": middle / flop_ratio,
        })  # fmt: skip
    return rows


def latents_shape(vae: ModelMixin, batch: int, size: Resolution, latent_frames: int | None) -> tuple[int, ...]:
    return batch, latent_channels(vae), *([latent_frames] if latent_frames else []), *sides(size)


def decode_call(vae: ModelMixin, latents: Tensor, config: LatencyConfig, device: torch.device, mode: str):
    """A call of the decoder as it will run: on the device, in the dtype, without gradients."""
    with quiet():
        copied = copy.deepcopy(vae).to(device, getattr(torch, config.dtype)).eval()
    decoder, z = decoder_of(copied), latents.to(device)
    if mode == "compiled":
        torch.compiler.reset()
        decoder = torch.compile(decoder, fullgraph=True)

    def call() -> None:
        with torch.inference_mode():
            decoder(z)

    return call
