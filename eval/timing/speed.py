"""How fast pipelines are, beside each other: interleaved calls from the prompt's text to 8-bit images on the host.

A speed is a ratio to another pipeline measured in the same minutes, with a bootstrap interval; the ratio of a pipeline
to itself says what such a ratio is worth.

Axes: P prompts, C channels, H and W height and width.
"""

import copy
import statistics
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torchvision.transforms.functional import pil_to_tensor

from slimstep.eval.config import LatencyConfig
from slimstep.eval.metrics.compare import bootstrap, interval
from slimstep.eval.sampling import Sampler
from slimstep.eval.timing.capture import CapturedSampler
from slimstep.eval.timing.inference import CannotRunError, InferenceConfig, prepare, running
from slimstep.eval.timing.latency import interleaved_times, one_thread
from slimstep.eval.timing.memory import MemoryFrom
from slimstep.eval.timing.stage_timer import timed_components
from slimstep.models.conditioning import cleans_captions
from slimstep.models.families.deepfloyd.cascade import first_stage_of, refines
from slimstep.models.family import family_of
from slimstep.models.first_frames import begins_with_frame, first_frames, noise_source
from slimstep.models.pipeline import networks

RESAMPLES = 2000  # of neighbouring calls
# What torch says where a device has no kernel for a dtype, a size or an operation.
# Memory runs out in CUDA's libraries, too, and for the driver: those errors are no OutOfMemoryError.
REFUSALS = ("No available kernel", "not implemented for", "not supported", "is unsupported", "not available",
            "out of memory", "unable to find an engine", "STATUS_ALLOC_FAILED", "STATUS_NOT_SUPPORTED",
            "CUBLAS_STATUS_NOT_INITIALIZED", "STATUS_ARCH_MISMATCH")  # fmt: skip


@dataclass(frozen=True)
class BenchmarkCase:
    """What a row runs: a model, with the UNet or VAE of another one, its steps, and how.

    `unet` and `vae` are pipelines' folders whose part takes the place of the model's.
    """

    model: str
    steps: int
    inference: InferenceConfig = InferenceConfig()
    unet: str = ""
    vae: str = ""


@dataclass
class TimedPipeline:
    """A pipeline that is timed, in one inference config.

    `kwargs` go to the pipeline's call beside the prompts: another task's image, mask or control images. Where there are
    none, the noise of prompt i is a function of (seed, i). A second stage is timed behind its first, as one pipeline;
    where a pipeline begins with a frame, prompts name those that it remembers. Raises CannotRunError where the
    config cannot run here.
    """

    pipeline: DiffusionPipeline
    inference: InferenceConfig
    prompts: Sequence[str]
    steps: int
    guidance_scale: float
    device: torch.device
    batch: int = 1
    seed: int = 0
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.inference.capture and (self.kwargs or self.draws_videos):
            raise CannotRunError("only txt2img is captured as one CUDA graph")
        upcast = hasattr(self.pipeline, "upcast_vae") and self.pipeline.vae.config.force_upcast
        if self.inference.capture and self.inference.dtype == "float16" and upcast:
            raise CannotRunError("this VAE overflows in float16, and the CUDA graph does not upcast it")
        with running(self.inference):
            self.pipeline = prepare(self.pipeline, self.inference, self.device)
        if refines(self.pipeline):
            first_stage_of(self.pipeline).pipeline.to(self.device, self.inference.torch_dtype)
        if hasattr(self.pipeline, "safety_checker"):
            self.pipeline.safety_checker = None  # it is another network's time, and it may return a black image
        self.pipeline.set_progress_bar_config(disable=True)

    @property
    def draws_videos(self) -> bool:
        return family_of(self.pipeline).DRAWS_VIDEOS

    @cached_property
    def sampler(self) -> Sampler:
        precision = "tf32" if self.inference.dtype == "tf32" else "float32"
        return Sampler(self.pipeline, self.steps, self.guidance_scale, self.seed, precision=precision)

    @cached_property
    def captured(self) -> CapturedSampler:
        return CapturedSampler(self.sampler)

    def noise(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self.sampler.noise(index) for index in indices])

    def draw(self, indices: Sequence[int]) -> list[Image.Image] | list[list[Image.Image]]:
        """The images of these prompts, or the frames of their videos."""
        prompts = [self.prompts[i % len(self.prompts)] for i in indices]
        with running(self.inference):
            if self.inference.capture:
                return self.captured.draw(prompts, self.noise(indices))
            noise, call = self.noise(indices).to(self.inference.torch_dtype), self.sampler.family.call
            if refines(self.pipeline):
                kwargs = self.before(prompts, self.sampler.generators(indices))
                kwargs |= call(self.pipeline, self.guidance_scale)
                return self.pipeline(num_inference_steps=self.steps, **kwargs).images
            if self.kwargs:
                kwargs = {**call(self.pipeline, self.guidance_scale), **self.kwargs}
            else:
                drawn = {"generator": self.sampler.generators(indices)}
                kwargs = call(self.pipeline, self.guidance_scale, noise) | drawn
            kwargs |= self.asked(prompts)
            drawn = self.pipeline(num_inference_steps=self.steps, output_type="pil", **kwargs)
            return drawn.frames if self.draws_videos else drawn.images

    def asked(self, prompts: list[str]) -> dict[str, Any]:
        """What prompts are in a pipeline's call: words where it reads some, the first frames that they name where it
        begins with one, each with its own noise."""
        words = {"prompt": prompts} if self.sampler.family.IS_CONDITIONAL else {}
        if not begins_with_frame(self.pipeline):
            return words
        pictures = [Image.fromarray(frame.numpy()) for frame in first_frames(self.pipeline, prompts)]
        return {**words, "image": pictures, "generator": [noise_source(picture) for picture in pictures]}

    def before(self, prompts: Sequence[str], generators: list[torch.Generator]) -> dict[str, Any]:
        """What a second stage's call is given in the place of prompts: text states, which its first stage shares, and
        the pictures that this draws of them."""
        stage, encode = first_stage_of(self.pipeline), self.pipeline.encode_prompt
        text_BLE, empty_BLE = encode(list(prompts), device=self.device, clean_caption=cleans_captions())
        shared = {"prompt_embeds": text_BLE, "negative_prompt_embeds": empty_BLE, "generator": generators}
        own = {"guidance_scale": stage.guidance_scale, "num_inference_steps": stage.steps, "output_type": "pt"}
        return {"image": stage.pipeline(**own, **shared).images, "noise_level": stage.noise_level, **shared}

    def at(self, steps: int) -> "TimedPipeline":
        """The same pipeline, as it is prepared, with another number of steps."""
        other = copy.copy(self)
        other.steps = steps
        for made in ("sampler", "captured"):
            other.__dict__.pop(made, None)
        return other

    def call(self) -> None:
        self.draw(range(self.batch))

    def images(self, count: int) -> Tensor:
        """uint8 images [count, 3, H, W], or videos [count, F, H, W, 3], always in batches of the same size: no graph is
        made for another."""
        rows = [drawn for i in range(0, count, self.batch) for drawn in self.draw(range(i, i + self.batch))][:count]
        if self.draws_videos:
            return torch.from_numpy(np.stack([np.stack([np.asarray(frame) for frame in frames]) for frames in rows]))
        return torch.stack([pil_to_tensor(image) for image in rows])


def measure(timed: TimedPipeline, others: Mapping[str, TimedPipeline], config: LatencyConfig) -> dict[str, Any]:
    """The pipeline's times and their parts, and its speed-up over each of the `others`, all interleaved.

    On a CPU times are one thread's CPU time; on a GPU they are wall time. `parts_of_whole` compares the parts' sum with
    calls without a stage timer. Raises what torch raises where the device cannot run it.
    """
    device, parts, unet_calls, unet_rows = timed.device, [], [], []
    with one_thread(device):
        for other in others.values():
            other.call()  # compiled ones may have to be made again
        memory = MemoryFrom(device)
        before, start = compiled_graphs(), time.perf_counter()
        timed.call()
        first_s, made = time.perf_counter() - start, compiled_graphs()
        needed = memory.of(timed.call, held_tensors(timed))

        def watch_parts() -> None:
            with timed_components(timed.pipeline, device) as timer:
                parts.append(timer.time(timed.call))
                unet_calls.append([part for part, _ in timer.marks].count("UNet"))
                unet_rows.append(timer.rows)

        calls = {name: other.call for name, other in others.items()} | {"this": timed.call}
        times = interleaved_times(calls if timed.inference.capture else calls | {"parts": watch_parts}, config, device)
    whole = times["this"]
    return {
        "ms": spread(whole),
        **together(parts[-len(whole) :], whole),  # the others warmed up
        "unet_calls": unet_calls[-1] if unet_calls else timed.steps,
        "unet_rows": unet_rows[-1] if unet_rows else None,
        "speedup": {name: speedup(times[name], whole) for name in others},
        "images_per_s": 1e3 * timed.batch / statistics.median(whole),
        **needed,
        "graphs": {key: value - before[key] for key, value in made.items()},
        "recompiled": compiled_graphs()["graphs"] - made["graphs"],
        "first_call_s": first_s,
    }


def together(parts: Sequence[Mapping[str, float]], whole_ms: Sequence[float]) -> dict[str, Any]:
    """The parts' medians, and their sum beside the neighbouring call without a timer; one CUDA graph has none."""
    if not parts:
        return {"parts_ms": {}, "parts_of_whole": None}
    names = [name for name, ms in parts[0].items() if ms]
    return {
        "parts_ms": {name: statistics.median(spent[name] for spent in parts) for name in names},
        "parts_of_whole": statistics.median(sum(p.values()) / ms for p, ms in zip(parts, whole_ms, strict=True)),
    }


def spread(times_ms: Sequence[float]) -> dict[str, float]:
    p10, p90 = np.quantile(times_ms, [0.1, 0.9])
    return {"median": statistics.median(times_ms), "p10": float(p10), "p90": float(p90), "min": min(times_ms),
            "n": len(times_ms)}  # fmt: skip


def speedup(before_ms: Sequence[float], after_ms: Sequence[float]) -> dict[str, float]:
    """How many times as fast: the median ratio of neighbouring calls, and its bootstrap 95 % interval over them."""
    ratios = np.asarray(before_ms) / np.asarray(after_ms)
    medians = [np.median(ratios[draws_RN], axis=-1) for draws_RN in bootstrap(len(ratios), RESAMPLES)]
    low, high = interval(np.concatenate(medians))
    return {"ratio": float(np.median(ratios)), "low": low, "high": high, "n": len(ratios)}


def compiled_graphs() -> dict[str, int]:
    """How many graphs torch.compile has made in this process, and how often it had to break one."""
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def held_tensors(timed: TimedPipeline) -> Iterator[Tensor]:
    """Weights and buffers of all of a pipeline's networks."""
    return (t for network in networks(timed.pipeline) for t in (*network.parameters(), *network.buffers()))


def reason(error: Exception) -> str | None:
    """Why a device or an installation cannot run something; None for an error that is no such thing."""
    # NotImplementedError is torch's for an operation that a backend lacks, ImportError a torchao of another torch's.
    kinds = (CannotRunError, torch.OutOfMemoryError, NotImplementedError, ImportError, TorchDynamoException)
    said = str(error).lower()
    known = (
        isinstance(error, kinds)
        or type(error).__module__.split(".")[0] == "triton"  # a kernel that does not fit on the device
        or (isinstance(error, RuntimeError) and any(words.lower() in said for words in REFUSALS))
    )
    return textwrap.shorten(str(error), 400, placeholder=" …") or type(error).__name__ if known else None


def matmul_peak_tflops(inference: InferenceConfig, device: torch.device) -> float:
    """10¹² operations a second of the best of a few square matrix products in the config's number format."""
    sizes = (4096, 8192) if device.type == "cuda" else (512, 1024)
    config = LatencyConfig(iterations=20, warmup=3, seconds=1.0)
    best = 0.0
    with running(inference), one_thread(device):
        for size in sizes:
            a, b = (torch.randn(size, size, device=device, dtype=inference.torch_dtype) for _ in range(2))
            times = interleaved_times({"product": lambda a=a, b=b: torch.mm(a, b)}, config, device, "peak")
            best = max(best, 2 * size**3 / (1e9 * min(times["product"])))
    return best
