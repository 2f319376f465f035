"""The component breakdown of one image's time: encoders, denoiser, ControlNet, scheduler and guidance, VAE, host.

A pipeline call is cut at the entries and exits of its networks, so the parts leave nothing out: they add up to the call
that they were measured in. Whether that call is as fast as one without a timer is for the caller to compare.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from slimstep.models.families.deepfloyd.cascade import first_stage_of, refines
from slimstep.models.networks import encoders, network_of

PARTS = ("text encoder", "image encoder", "first stage", "ControlNet", "UNet", "scheduler", "VAE", "host")


class StageTimer:
    """Marks on a timeline: CUDA events, or the calling thread's CPU time."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, torch.cuda.Event | float]] = []
        self.between = "host"
        self.rows = 0  # of all evaluations of the denoiser: guidance runs two an image, in one call or in two

    def mark(self, part: str) -> None:
        """The time since the last mark belongs to `part`."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.thread_time()))

    def time(self, call: Callable[[], None]) -> dict[str, float]:
        """Milliseconds of the parts of one call; what lies between the first denoising network's end and the VAE is the
        scheduler's, guidance included, and all else between networks the host's."""
        self.marks, self.between, self.rows = [], "host", 0
        self.mark("")
        call()
        self.mark("host")
        if self.on_gpu:
            torch.cuda.synchronize()
        spent = dict.fromkeys(PARTS, 0.0)
        for (_, start), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            spent[part] += start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)
        return spent


@contextmanager
def timed_components(pipeline: DiffusionPipeline, device: torch.device) -> Iterator[StageTimer]:
    """A stage timer whose marks the pipeline's networks set while the block runs."""
    timer, handles = StageTimer(device), []

    def cut(first: nn.Module, last: nn.Module, part: str, after: str) -> None:
        def enter(*_) -> None:
            timer.mark(timer.between)

        def leave(*_) -> None:
            timer.mark(part)
            timer.between = after

        handles.append(first.register_forward_pre_hook(enter))
        handles.append(last.register_forward_hook(leave))

    def count(network: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        timer.rows += len(next(tensor for tensor in tensors if tensor.ndim > 2))  # x_t, and not a timestep

    handles.append(network_of(pipeline).register_forward_pre_hook(count, with_kwargs=True))
    for name, encoder in encoders(pipeline).items():
        cut(encoder, encoder, "image encoder" if name == "image_encoder" else "text encoder", "host")
    if (controlnet := getattr(pipeline, "controlnet", None)) is not None:
        cut(controlnet, controlnet, "ControlNet", "scheduler")
    cut(network_of(pipeline), network_of(pipeline), "UNet", "scheduler")
    if (vae := getattr(pipeline, "vae", None)) is not None:
        cut(vae.encoder, getattr(vae, "quant_conv", None) or vae.encoder, "VAE", "host")
        cut(getattr(vae, "post_quant_conv", None) or vae.decoder, vae.decoder, "VAE", "host")
    if refines(pipeline):
        before = first_stage_of(pipeline).pipeline.unet
        cut(before, before, "first stage", "scheduler")
    try:
        yield timer
    finally:
        for handle in handles:
            handle.remove()
