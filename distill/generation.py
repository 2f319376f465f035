"""What a few-step student draws while it is trained: the samples of its own sampler, stopped at one of its steps.

Axes: B batch, N steps of the student.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor, nn

from slimstep.distill.teaching import StepSchedule
from slimstep.engine.objective import Batch
from slimstep.engine.seeding import generator as seeded
from slimstep.models.conditioning import Conditioning, conditioning_of
from slimstep.models.denoiser import Denoiser, takes_guidance
from slimstep.models.guidance import guided
from slimstep.models.noise_schedule import Level, NoiseSchedule, add_noise, ddim_step, x0_of

SPREAD = {"spread": (0.1, 50.0)}  # of samples, in units of the training images': beyond that they are no images


@dataclass(frozen=True)
class Generated:
    """Samples [B, …] that a student sees at z, in one of its steps, and what they are conditioned on."""

    x0: Tensor
    cond: Conditioning
    z: Tensor
    step: int


@dataclass(frozen=True)
class Generation:
    """Backward simulation (Yin et al. 2024b, section 4.5): a student is trained where its own sampler takes it.

    A batch goes down the student's grid from noise, without gradient, to one of its steps, all of which come equally
    often; the sample is what the student sees there. Where it `renoises` each step adds new noise to what was seen, as
    LCMScheduler and DMD2 do; else noise is carried along, as by DDIM and by Euler's method. `guidance_scale` is passed
    on to networks that take it as an input; others are not guided.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    bounds_N2: Tensor
    guidance_scale: float
    renoises: bool = False

    @classmethod
    def of(
        cls, denoiser: Denoiser, schedule: NoiseSchedule, steps: StepSchedule, teacher: nn.Module, scale: float
    ) -> "Generation":
        """On the grid of the scheduler that the student is exported with, on the teacher's device."""
        scheduler, device = steps.student_scheduler, next(teacher.parameters()).device
        grid, renoises = schedule.grid(scheduler, steps.steps), isinstance(scheduler, LCMScheduler)
        return cls(denoiser, schedule, grid.to(device), scale, renoises)

    def __call__(
        self, student: nn.Module, batch: Batch, uncond: Conditioning, generator: torch.Generator
    ) -> Generated:
        """A sample for every caption of the batch; its gradient is that of the student's last evaluation.

        The step at which it stops is drawn on the host, of the generator's seed, so that no GPU is waited for.
        """
        cond, kind = conditioning_of(batch, like=uncond), self.schedule.prediction_type
        device = batch["latents"].device
        draw: dict[str, Any] = {"generator": generator, "device": device}
        stop = int(torch.randint(len(self.bounds_N2), (), generator=seeded(generator.initial_seed(), "stop")))
        z, rows = torch.randn(batch["latents"].shape, **draw), len(batch["latents"])
        for start, end in self.bounds_N2[:stop]:
            with torch.no_grad():
                pred = self.predict(student, z, start.expand(rows), cond)
                here, there = (self.schedule.alpha_sigma(t.expand(rows)) for t in (start, end))
                if self.renoises:
                    z = add_noise(x0_of(pred, z, here, kind), torch.randn(z.shape, **draw), there)
                else:
                    z = ddim_step(pred, z, here, there, kind)
        t_B = self.bounds_N2[stop, 0].expand(rows)
        x0 = x0_of(self.predict(student, z, t_B, cond), z, self.schedule.alpha_sigma(t_B), kind)
        return Generated(x0, cond, z, stop)

    @property
    def rows_before(self) -> float:
        """Evaluations without a gradient before a sample's last one, in the mean over the stops."""
        return (len(self.bounds_N2) - 1) / 2

    def predict(self, network: nn.Module, z: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        w_B = torch.full_like(t_B, self.guidance_scale, dtype=torch.float32) if takes_guidance(network) else None
        return self.denoiser(network, z, t_B, cond, guidance_B=w_B)

    def x0(self, network: nn.Module, noisy: "Noisy", uncond: Conditioning | None = None) -> Tensor:
        """x̂ of a network at noisy samples; with `uncond` guided, where the network is not distilled to be."""
        inputs = noisy.z, noisy.t_B, noisy.cond
        if uncond is None or self.guidance_scale == 1 or takes_guidance(network):
            pred = self.predict(network, *inputs)
        else:
            pred, _ = guided(self.denoiser, network, *inputs, uncond, self.guidance_scale)
        return x0_of(pred, noisy.z, noisy.level, self.schedule.prediction_type)


@dataclass(frozen=True)
class Noisy:
    """Samples with noise: z [B, …] at times t_B, whose (α, σ) is `level`."""

    z: Tensor
    noise: Tensor
    t_B: Tensor
    level: Level
    cond: Conditioning


def renoised(
    generated: Generated, schedule: NoiseSchedule, time_range: tuple[float, float], generator: torch.Generator
) -> Noisy:
    """The samples with new noise, at uniform shares of the way to noise within `time_range`."""
    low, high = time_range
    draw: dict[str, Any] = {"generator": generator, "device": generated.x0.device}
    t_B = schedule.time_at(low + (high - low) * torch.rand(len(generated.x0), **draw))
    noise, level = torch.randn(generated.x0.shape, **draw), schedule.alpha_sigma(t_B)
    return Noisy(add_noise(generated.x0, noise, level), noise, t_B, level, generated.cond)


def spread(generated: Generated, batch: Batch) -> Tensor:
    """The samples' standard deviation over the batch, in units of the training images'; it falls as samples become
    alike."""
    return generated.x0.detach().std(0).mean() / batch["latents"].std(0).mean()


def check_time_range(time_range: tuple[float, float]) -> None:
    low, high = time_range
    if not 0 < low < high < 1:
        raise ValueError(f"objective.time_range={list(time_range)} must be two shares, 0 < low < high < 1")
