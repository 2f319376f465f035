"""How many rows a second this device makes, and how many hours a plan's work takes at that rate."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from slimstep.engine.config import TrainConfig
from slimstep.eval.inputs import Teacher
from slimstep.eval.timing.latency import wall_ms
from slimstep.eval.timing.precision import computing
from slimstep.models.decoding import decoder_of
from slimstep.models.family import denoiser_of
from slimstep.models.sizes import latents_together

SECONDS, CALLS = 4.0, 3  # about as long a timed call may take, and how many there are


def hours(teacher: Teacher, rows: dict[str, int], training: TrainConfig) -> tuple[float, dict[str, float]]:
    """How long all processes take for rows of each kind, and the rates behind it, in rows a second of one process.

    rows: {"forward": a teacher's UNet evaluations, "sampling": those that draw images, "training": those with a
    backward, "decoding": images of a decoder that learns}.
    What `rates` gives is taken, the rest measured, in the job's batches where a call of them takes seconds and not
    minutes. Not counted is what loads, writes, times and compiles.
    """
    measures = {
        "forward": forward_rate, "sampling": sampling_rate, "training": training_rate, "decoding": decoding_rate,
    }  # fmt: skip
    configured = teacher.config.rates
    rates = {kind: configured[kind] or measures[kind](teacher, training) for kind, count in rows.items() if count}
    seconds = sum(rows[kind] / rate for kind, rate in rates.items()) / teacher.run.accelerator.num_processes
    return seconds / 3600, rates


def forward_rate(teacher: Teacher, training: TrainConfig) -> float:
    return evaluation_rate(teacher, teacher.run.accelerator.autocast, training.batch_size)


def sampling_rate(teacher: Teacher, training: TrainConfig) -> float:
    """Images are drawn in the precision of `sampling`, two rows each where they are guided."""
    weights = next(teacher.unet.parameters())
    return evaluation_rate(teacher, lambda: computing(teacher.precision, weights), 2 * teacher.config.eval.batch_size)


def evaluation_rate(teacher: Teacher, precision: Callable[[], AbstractContextManager], batch: int) -> float:
    denoiser = denoiser_of(teacher.unet)

    def forward(rows: int) -> Callable[[], None]:
        inputs = denoiser.example(teacher.unet, rows, tokens=teacher.text_length)

        def call() -> None:
            with torch.inference_mode(), precision():
                denoiser(teacher.unet, *inputs)

        return call

    return rate(forward, batch, teacher.device)


def training_rate(teacher: Teacher, training: TrainConfig) -> float:
    """Forward and backward; an optimiser's step is small beside them."""
    unet, denoiser = teacher.unet, denoiser_of(teacher.unet)
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()

    def forward(rows: int) -> Callable[[], Tensor]:
        inputs = denoiser.example(unet, rows, tokens=teacher.text_length)
        return lambda: denoiser(unet, *inputs)

    measured = backward_rate(teacher, unet.train(), forward, training.batch_size)
    unet.eval().disable_gradient_checkpointing()
    return measured


def decoding_rate(teacher: Teacher, training: TrainConfig) -> float:
    """The teacher decoder's forward and backward: more than the pruned one's and the teacher's forward."""
    decoder, (channels, *sides) = decoder_of(teacher.pipeline.vae), denoiser_of(teacher.unet).sample_shape
    if count := latents_together(teacher.pipeline, OmegaConf.select(teacher.config, "decoder.frames")):
        sides[0] = count

    def forward(rows: int) -> Callable[[], Tensor]:
        latents = torch.randn(rows, channels, *sides, device=teacher.device)
        return lambda: decoder(latents)

    return backward_rate(teacher, decoder.decoder, forward, training.batch_size)


def backward_rate(
    teacher: Teacher, network: nn.Module, forward: Callable[[int], Callable[[], Tensor]], batch: int
) -> float:
    """Rows a second; the network is frozen afterwards, as it was."""

    def both(rows: int) -> Callable[[], None]:
        ahead = forward(rows)

        def call() -> None:
            with teacher.run.accelerator.autocast():
                loss = ahead().float().square().mean()
            loss.backward()
            network.zero_grad(set_to_none=True)

        return call

    network.requires_grad_(True)
    try:
        return rate(both, batch, teacher.device)
    finally:
        network.requires_grad_(False)


def rate(of_rows: Callable[[int], Callable[[], None]], batch: int, device: torch.device) -> float:
    """Rows a second of wall time, after a first call. A batch is as large as the job's, or as SECONDS allow."""
    one_ms = min(wall_ms(of_rows(1), device) for _ in range(2))  # the first call of a process is slow
    rows = max(1, min(batch, int(1e3 * SECONDS / one_ms)))
    call = of_rows(rows)
    if rows > 1:
        call()
    calls = 1 if rows == 1 else CALLS
    return 1e3 * rows / min(wall_ms(call, device) for _ in range(calls))
