"""What every distillation of steps is made of: noisy starts, guided predictions, and teacher targets.

Axes: B batch, G guided rows, N steps of the student, K bounds of the teacher's steps within one of them, C channels,
H and W latent size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimstep.engine.objective import Batch
from slimstep.models.conditioning import Conditioning, conditioning_of
from slimstep.models.denoiser import Denoiser, guidance_embed_dim
from slimstep.models.guidance import guided
from slimstep.models.noise_schedule import (
    NoiseSchedule,
    add_noise,
    ddim_step,
    nested_steps,
    snr,
    x0_between,
    x0_of,
)

WEIGHTINGS = ("relative", "truncated_snr", "snr_plus_one", "uniform")
LEAST_GAP = 1e-6


@dataclass(frozen=True)
class StepSchedule:
    """What a distillation stage teaches: `teacher_steps` DDIM steps done in `steps` of the student's sampler."""

    teacher_scheduler: object
    teacher_steps: int
    student_scheduler: object
    steps: int

    @property
    def limit(self) -> Callable[[Tensor], Tensor] | None:
        """What the teacher's sampler makes of an x̂: dynamic thresholding (Saharia et al. 2022, section 2.3), if any."""
        scheduler = self.teacher_scheduler
        return scheduler._threshold_sample if scheduler.config.get("thresholding") else None

    def bounds(self, schedule: NoiseSchedule) -> Tensor:
        """[N, K]: start, inner times and end of every step of the student."""
        return nested_steps(schedule, self.student_scheduler, self.steps, self.teacher_scheduler, self.teacher_steps)


@dataclass(frozen=True)
class Draw:
    """Noisy latents at the starts of random steps of the student, and the way each has to go."""

    x0_BCHW: Tensor
    noise_BCHW: Tensor
    z_BCHW: Tensor
    bounds_BK: Tensor
    cond: Conditioning

    @property
    def t_B(self) -> Tensor:
        return self.bounds_BK[:, 0]

    @property
    def end_B(self) -> Tensor:
        return self.bounds_BK[:, -1]


def draw_steps(
    batch: Batch, schedule: NoiseSchedule, bounds_NK: Tensor, cond: Conditioning, generator: torch.Generator
) -> Draw:
    """A random step for every sample, and latents noised to where it starts."""
    x0_BCHW = batch["latents"]
    draw = {"generator": generator, "device": x0_BCHW.device}
    bounds_BK = bounds_NK.to(x0_BCHW.device)[torch.randint(len(bounds_NK), (len(x0_BCHW),), **draw)]
    noise_BCHW = torch.randn(x0_BCHW.shape, **draw)
    z_BCHW = add_noise(x0_BCHW, noise_BCHW, schedule.alpha_sigma(bounds_BK[:, 0]))
    return Draw(x0_BCHW, noise_BCHW, z_BCHW, bounds_BK, cond)


def drop_captions(batch: Batch, uncond: Conditioning, dropout: float, spared: int, generator) -> Conditioning:
    """A batch's conditioning, some rows without a caption, but not the first `spared` ones, which are guided."""
    rows, device = len(batch["latents"]), batch["latents"].device
    keep_B = torch.rand(rows, generator=generator, device=device) >= dropout
    keep_B[:spared] = True
    return conditioning_of(batch, like=uncond).where(keep_B, uncond)


@dataclass(frozen=True)
class Target:
    """x̃: what the student has to see in z_t for its one DDIM step to land where the teacher's steps land.

    `gap_B` is how far from it the teacher's own x̂ in z_t is: the squared error of its going there at once.
    """

    x0_BCHW: Tensor
    gap_B: Tensor


@torch.no_grad()
def teacher_target(
    denoiser: Denoiser,
    teacher: nn.Module,
    schedule: NoiseSchedule,
    draw: Draw,
    uncond: Conditioning,
    w_G: Tensor,
    limit: Callable[[Tensor], Tensor] | None = None,
) -> Target:
    """Where the teacher's steps from z_t lead. limit: what each step makes of its x̂."""
    z_BCHW, at_once_BCHW, kind = draw.z_BCHW, None, schedule.prediction_type
    for t_B, s_B in zip(draw.bounds_BK.T[:-1], draw.bounds_BK.T[1:], strict=True):
        if guidance_embed_dim(teacher):
            pred_BCHW = denoiser(teacher, z_BCHW, t_B, draw.cond, guidance_B=w_G)
        else:
            pred_BCHW, _ = guided(denoiser, teacher, z_BCHW, t_B, draw.cond, uncond, w_G)
        here, there = schedule.alpha_sigma(t_B), schedule.alpha_sigma(s_B)
        if at_once_BCHW is None:
            x0_BCHW = x0_of(pred_BCHW, z_BCHW, here, kind)
            at_once_BCHW = limit(x0_BCHW) if limit else x0_BCHW
        z_BCHW = ddim_step(pred_BCHW, z_BCHW, here, there, kind, limit)
    start, end = schedule.alpha_sigma(draw.t_B), schedule.alpha_sigma(draw.end_B)
    x0_BCHW = x0_between(draw.z_BCHW, start, z_BCHW, end)
    return Target(x0_BCHW, squared_error(at_once_BCHW, x0_BCHW))


def weights(schedule: NoiseSchedule, draw: Draw, target: Target, weighting: str) -> Tensor:
    """Of the squared error in x: 1 / gap, or max(SNR, 1), SNR + 1 (Salimans & Ho 2022, section 4), or 1.

    Relative to the gap every step counts alike, and the loss is the share of the teacher's own error that is left:
    1 for a student that is its teacher. By SNR the first steps, whose gap is hundreds of times that of the middle ones,
    are nearly all of the loss.
    """
    if weighting == "relative":
        return 1 / target.gap_B.clamp(min=LEAST_GAP)
    if weighting == "uniform":
        return torch.ones_like(target.gap_B)
    snr_B = snr(schedule.alpha_sigma(draw.t_B))
    return snr_B.clamp(min=1) if weighting == "truncated_snr" else snr_B + 1


def error_in_x(pred_BCHW: Tensor, target: Target, draw: Draw, schedule: NoiseSchedule, weighting: str) -> Tensor:
    """The weighted squared error of the x̂ a prediction stands for."""
    x0_BCHW = x0_of(pred_BCHW, draw.z_BCHW, schedule.alpha_sigma(draw.t_B), schedule.prediction_type)
    return (weights(schedule, draw, target, weighting) * squared_error(x0_BCHW, target.x0_BCHW)).mean()


def squared_error(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """[B], the mean over each sample."""
    return (a_BCHW - b_BCHW).square().mean(tuple(range(1, a_BCHW.ndim)))


def draw_guidance(rows: int, guidance_range: tuple[float, float], generator: torch.Generator) -> Tensor:
    """w ~ U[low, high] per row."""
    low, high = guidance_range
    return low + (high - low) * torch.rand(rows, generator=generator, device=generator.device)


def validate_weighting(weighting: str, step_schedule: StepSchedule) -> None:
    if weighting not in WEIGHTINGS:
        raise ValueError(f"objective.weighting={weighting!r} is unknown; choose from {WEIGHTINGS}")
    if weighting == "relative" and step_schedule.steps == step_schedule.teacher_steps:
        raise ValueError(f"objective.weighting=relative needs a teacher with more steps than {step_schedule.steps}")


def validate_range(guidance_range: tuple[float, float]) -> None:
    low, high = guidance_range
    if not 1 <= low <= high:
        raise ValueError(f"objective.guidance_range={list(guidance_range)} must be two scales, 1 <= low <= high")
