"""Noise schedules, z_t = α_t x0 + σ_t ε, and what holds on every one of them.

A `NoiseSchedule` gives α and σ at a time, and the times of training and of sampling. Everything else is a free function
of a level, the pair (α, σ) of each row, and of what the network predicts, for samples of any number of axes: ε; v = α ε
− σ x0 (Salimans & Ho 2022, section 4); the sample x0; the flow ε − x0 (Liu et al. 2023); or EDM's F (models/edm.py).

Axes: B batch, T training timesteps, N steps of a sampler, K bounds of a step. z, x0, ε and predictions are [B, …].
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from diffusers import EulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from slimstep.models.edm import (
    Preconditioned,
    Sigmas,
    check_edm,
    is_continuous_euler,
    is_edm,
    preconditioning_of,
    sigma_at,
    sigmas_of,
    time_of,
    times_of,
)
from slimstep.models.flow import FlowSteps, check_flow, is_flow, set_steps, shift_of, shifted, unshifted
from slimstep.models.schedulers import check_noise_schedule

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # of schedules with betas; a rectified flow's is "flow"
Prediction = str | Preconditioned  # the latter is EDM's
Level = tuple[Tensor, Tensor]  # α and σ, [B] each
EDM_LOG_SIGMA, SVD_LOG_SIGMA = (-1.2, 1.2), (0.7, 1.6)  # mean and deviation of ln σ in training
LEAST_SIGMA = 0.025  # of noise at the start of a step: with less the step has next to nothing to do


class NoiseSchedule(Protocol):
    """How noisy samples are at each time; times may be whole timesteps or continuous."""

    @property
    def prediction_type(self) -> Prediction: ...

    def alpha_sigma(self, t_B: Tensor) -> Level:
        """α and σ, each shaped as `t_B`."""
        ...

    def sample_times(self, size: int, generator: torch.Generator) -> Tensor:
        """[size] times to train at, on the generator's device."""
        ...

    def time_at(self, share_B: Tensor) -> Tensor:
        """[B] times so far along the way from the sample, 0, to noise, 1, as samplers go it."""
        ...

    def share_at(self, t_B: Tensor) -> Tensor:
        """The inverse of `time_at`, shaped as `t_B`."""
        ...

    def grid(self, scheduler: SchedulerMixin, steps: int) -> Tensor:
        """[steps, 2]: the times at which each step of a diffusers scheduler starts and lands."""
        ...


@dataclass(frozen=True)
class VariancePreserving:
    """α_t and σ_t (α² + σ² = 1) in tables of a network's training timesteps, and what it predicts.

    Timestep −1 is where a sampler's last step lands: `final_alpha`, 1 for clean samples. `trained_N` are the only
    timesteps that are trained at, where the network was distilled to a few.
    """

    alpha_T: Tensor
    sigma_T: Tensor
    prediction_type: str
    final_alpha: float = 1.0
    trained_N: Tensor | None = None

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {self.prediction_type!r} is unknown; choose from {PREDICTION_TYPES}")

    def __len__(self) -> int:
        return len(self.alpha_T)

    def alpha_sigma(self, t_B: Tensor) -> Level:
        alpha_B = torch.where(t_B < 0, self.final_alpha, self.alpha_T[t_B])
        sigma_B = torch.where(t_B < 0, (1 - self.final_alpha**2) ** 0.5, self.sigma_T[t_B])
        return alpha_B, sigma_B

    def sample_times(self, size: int, generator: torch.Generator) -> Tensor:
        if self.trained_N is not None:
            return one_of(self.trained_N, size, generator)
        return torch.randint(len(self), (size,), generator=generator, device=generator.device)

    def time_at(self, share_B: Tensor) -> Tensor:
        return (share_B * len(self)).long().clamp(max=len(self) - 1)

    def share_at(self, t_B: Tensor) -> Tensor:
        return t_B.clamp(min=0) / len(self)

    def grid(self, scheduler: SchedulerMixin, steps: int) -> Tensor:
        """Whole timesteps of diffusers' DDIM, LCM or Euler sampler; −1 is the end.

        Euler lands where the next step starts. DDIM lands T // steps below the start, which is one off the next start
        here and there where `steps` does not divide T, and for a few numbers (6, 15, 24 …) ends at timestep 0, not at
        the end.
        """
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(steps)
        starts_N = scheduler.timesteps.cpu().long()
        if len(starts_N) != steps:
            raise ValueError(f"the scheduler makes {len(starts_N)} steps of {steps}; choose a divisor of its timesteps")
        if isinstance(scheduler, EulerDiscreteScheduler):
            return torch.stack([starts_N, torch.cat([starts_N[1:], torch.tensor([-1])])], dim=1)
        ends_N = (starts_N - scheduler.config.num_train_timesteps // steps).clamp(min=-1)
        return torch.stack([starts_N, ends_N], dim=1)


@dataclass(frozen=True)
class RectifiedFlow:
    """α = 1 − t/T and σ = t/T, for times from 0, the sample, to T, noise; DDIM's step is Euler's step here.

    T is `num_train_timesteps`: a time is the timestep that a pipeline gives its network. Training times are
    logit-normal, with mean 0 and standard deviation `std`, and shifted as the scheduler's (Esser et al. 2024, section
    3.1); or, where the network was distilled to a few times, one of these, `trained_N`. `steps`: how the pipeline makes
    its steps.
    """

    prediction_type: str = "flow"
    num_train_timesteps: int = 1
    shift: float = 1.0
    std: float = 1.0
    steps: FlowSteps = FlowSteps()
    trained_N: Tensor | None = None

    def alpha_sigma(self, t_B: Tensor) -> Level:
        sigma_B = t_B / self.num_train_timesteps
        return 1 - sigma_B, sigma_B

    def sample_times(self, size: int, generator: torch.Generator) -> Tensor:
        if self.trained_N is not None:
            return one_of(self.trained_N, size, generator)
        u_B = torch.sigmoid(self.std * torch.randn(size, generator=generator, device=generator.device))
        return self.time_at(u_B)

    def time_at(self, share_B: Tensor) -> Tensor:
        return shifted(share_B, self.shift) * self.num_train_timesteps

    def share_at(self, t_B: Tensor) -> Tensor:
        return unshifted(t_B / self.num_train_timesteps, self.shift)

    def grid(self, scheduler: SchedulerMixin, steps: int) -> Tensor:
        """Those of a flow's scheduler, which lands where the next step starts, and ends at 0."""
        scheduler = copy.deepcopy(scheduler)
        set_steps(scheduler, steps, self.steps)
        sigmas = scheduler.sigmas.cpu() * self.num_train_timesteps
        return torch.stack([sigmas[:-1], sigmas[1:]], dim=1)

    def within(self, bounds_N2: Tensor, parts: int) -> Tensor:
        """[N, parts + 1]: each step, cut into so many that are equally long before the shift.

        Grids with a shift do not nest (of shift 3, 4 steps start at 1000, 858, 602 and 9, 8 at 1000, 948, 883, …): a
        teacher steps at these times instead.
        """
        start_N1, end_N1 = unshifted(bounds_N2 / self.num_train_timesteps, self.shift).split(1, dim=1)
        share_K = torch.linspace(0, 1, parts + 1)
        times_NK = shifted(start_N1 + (end_N1 - start_N1) * share_K, self.shift) * self.num_train_timesteps
        times_NK[:, [0, -1]] = bounds_N2  # to the bit, as the student's scheduler has them
        return times_NK


@dataclass(frozen=True)
class VarianceExploding:
    """EDM's samples with noise as its networks see them, c_in (x0 + σ ε): α = c_in and σ = c_in σ, with the paper's σ
    on the right (models/edm.py); c_in = 1 / √(σ² + σ_d²).

    A time is c_noise, the timestep that a pipeline gives its network; −∞ is that of a sample. Training times are those
    of a σ whose logarithm is normal, with this mean and deviation (Karras et al. 2022, table 1; of videos Blattmann et
    al. 2023b, Stable Video Diffusion); or, where the network
    was distilled to a few times, one of these, `trained_N`. As the target is F, the squared error is the paper's:
    λ(σ) ‖D − x0‖² with λ = 1 / c_out².
    """

    prediction_type: Preconditioned
    sigmas: Sigmas
    log_mean: float = EDM_LOG_SIGMA[0]
    log_std: float = EDM_LOG_SIGMA[1]
    trained_N: Tensor | None = None

    def alpha_sigma(self, t_B: Tensor) -> Level:
        sigma_B = sigma_at(t_B)
        c_in_B = (sigma_B**2 + self.prediction_type.sigma_data**2).rsqrt()
        return c_in_B, c_in_B * sigma_B

    def sample_times(self, size: int, generator: torch.Generator) -> Tensor:
        if self.trained_N is not None:
            return one_of(self.trained_N, size, generator)
        normal_B = torch.randn(size, generator=generator, device=generator.device)
        return (self.log_mean + self.log_std * normal_B) / 4

    def time_at(self, share_B: Tensor) -> Tensor:
        return time_of(self.sigmas.at(share_B))

    def share_at(self, t_B: Tensor) -> Tensor:
        return self.sigmas.shares(sigma_at(t_B))

    def grid(self, scheduler: SchedulerMixin, steps: int) -> Tensor:
        """Those of an EDM scheduler, which lands where the next step starts, and ends in a sample."""
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(steps)
        times = times_of(scheduler)
        return torch.stack([times[:-1], times[1:]], dim=1)

    def within(self, bounds_N2: Tensor, parts: int) -> Tensor:
        """[N, parts + 1]: each step, cut into so many equal shares of the way; the last as if it ended at σ_min."""
        start_N1, end_N1 = self.share_at(bounds_N2).split(1, dim=1)
        times_NK = self.time_at(start_N1 + (end_N1 - start_N1) * torch.linspace(0, 1, parts + 1))
        times_NK[:, [0, -1]] = bounds_N2  # to the bit, as the student's scheduler has them
        return times_NK


AnySchedule = VariancePreserving | RectifiedFlow | VarianceExploding


def schedule_of(
    scheduler: SchedulerMixin, device: str | torch.device = "cpu", flow: FlowSteps | None = None
) -> AnySchedule:
    """The schedule of any diffusers scheduler that carries `alphas_cumprod`, zero terminal SNR included, or is flow
    matching's or EDM's; `flow` is how the model's pipeline makes the steps of a flow.

    Raises ValueError for others, and for an unknown prediction type.
    """
    if is_edm(scheduler):
        check_edm(scheduler)
        log_sigma = SVD_LOG_SIGMA if is_continuous_euler(scheduler) else EDM_LOG_SIGMA
        return VarianceExploding(preconditioning_of(scheduler), sigmas_of(scheduler), *log_sigma)
    if is_flow(scheduler):
        check_flow(scheduler)
        flow = flow or FlowSteps()
        shift, timesteps = shift_of(scheduler, flow), scheduler.config.num_train_timesteps
        return RectifiedFlow(num_train_timesteps=timesteps, shift=shift, steps=flow)
    check_noise_schedule(scheduler)
    alpha_bar_T = scheduler.alphas_cumprod.to(device=device, dtype=torch.float64)
    final_alpha = float(getattr(scheduler, "final_alpha_cumprod", 1.0)) ** 0.5
    alpha_T, sigma_T = alpha_bar_T.sqrt().float(), (1 - alpha_bar_T).sqrt().float()
    return VariancePreserving(alpha_T, sigma_T, scheduler.config.get("prediction_type"), final_alpha)


def trained_at_steps(schedule: AnySchedule, scheduler: SchedulerMixin, steps: int) -> AnySchedule:
    """The schedule of a network that learnt nothing but the timesteps at which `scheduler` starts so many steps."""
    return replace(schedule, trained_N=schedule.grid(scheduler, steps)[:, 0])


def are_among(times_S: Tensor, trained_N: Tensor, schedule: NoiseSchedule) -> bool:
    """Whether each of these times is one of those that a network was trained at; but for betas they are no whole
    numbers, and EDM's span less than 3."""
    nearest = 1e-3 if isinstance(schedule, VarianceExploding) else 0.5
    return bool((times_S[:, None] - trained_N).abs().amin(dim=1).max() < nearest)


def one_of(times_N: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """[size] of these times, each as likely as the others, on the generator's device."""
    index = torch.randint(len(times_N), (size,), generator=generator, device=generator.device)
    return times_N.to(generator.device)[index]


# ---- what holds on every schedule


def each(x_B: Tensor, like: Tensor) -> Tensor:
    """A number for each row, shaped so that it meets the axes of `like`."""
    return x_B.view(-1, *[1] * (like.ndim - 1))


def snr(level: Level) -> Tensor:
    """Signal-to-noise ratio α²/σ², shaped [B]; 0 where nothing of the sample is left."""
    alpha_B, sigma_B = level
    return (alpha_B / sigma_B) ** 2


def add_noise(x0: Tensor, noise: Tensor, level: Level) -> Tensor:
    """z = α x0 + σ ε."""
    alpha, sigma = (each(x_B, x0) for x_B in level)
    return alpha * x0 + sigma * noise


def target_of(x0: Tensor, noise: Tensor, level: Level, prediction_type: Prediction) -> Tensor:
    """What the network has to predict at this level."""
    alpha, sigma = (each(x_B, x0) for x_B in level)
    match prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return x0
        case "v_prediction":
            return alpha * noise - sigma * x0
        case Preconditioned(sigma_data, sign):
            return sign * (sigma / sigma_data * x0 - sigma_data * alpha * noise)
    return noise - x0


def x0_of(pred: Tensor, z: Tensor, level: Level, prediction_type: Prediction) -> Tensor:
    """The sample that a prediction at z stands for; infinite for ε-prediction where α = 0."""
    alpha, sigma = (each(x_B, z) for x_B in level)
    match prediction_type:
        case "epsilon":
            return (z - sigma * pred) / alpha
        case "sample":
            return pred
        case "v_prediction":
            return alpha * z - sigma * pred
        case Preconditioned(sigma_data, sign):  # c_skip z / c_in + c_out F
            return sigma_data * (sigma_data * alpha * z + sign * sigma * pred)
    return (z - sigma * pred) / (alpha + sigma)


def eps_of(pred: Tensor, z: Tensor, level: Level, prediction_type: Prediction) -> Tensor:
    """The noise that a prediction at z stands for; infinite for sample prediction where σ = 0."""
    alpha, sigma = (each(x_B, z) for x_B in level)
    match prediction_type:
        case "epsilon":
            return pred
        case "sample":
            return (z - alpha * pred) / sigma
        case "v_prediction":
            return sigma * z + alpha * pred
        case Preconditioned(sigma_data, sign):
            return sigma * z - sign * sigma_data * alpha * pred
    return (z + alpha * pred) / (alpha + sigma)


def pred_of(x0: Tensor, z: Tensor, level: Level, prediction_type: Prediction) -> Tensor:
    """What the network would have to predict at z to stand for x0; but for sample prediction σ must be above 0."""
    if prediction_type == "sample":
        return x0
    alpha, sigma = (each(x_B, z) for x_B in level)
    return target_of(x0, (z - alpha * x0) / sigma, level, prediction_type)


def ddim_step(
    pred: Tensor, z: Tensor, start: Level, end: Level, prediction_type: Prediction,
    limit: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Where one deterministic step from z lands: α_s x̂ + σ_s ε̂ (Song et al. 2021, equation 12 with η = 0).

    limit: what a sampler makes of x̂, as by dynamic thresholding; ε̂ is then the noise that this x̂ leaves of z.
    """
    alpha, sigma = (each(x_B, z) for x_B in end)
    x0 = x0_of(pred, z, start, prediction_type)
    if limit is None:
        return alpha * x0 + sigma * eps_of(pred, z, start, prediction_type)
    limited, (alpha_t, sigma_t) = limit(x0), (each(x_B, z) for x_B in start)
    return alpha * limited + sigma * (z - alpha_t * limited) / sigma_t


def x0_between(z: Tensor, start: Level, z_end: Tensor, end: Level) -> Tensor:
    """The x̂ with which one DDIM step from z lands on z_end (Salimans & Ho 2022, algorithm 2); float32 inside.

    x̃ = (z_s − (σ_s/σ_t) z_t) / (α_s − (σ_s/σ_t) α_t)
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([each(x_B, z) for x_B in level] for level in (start, end))
    ratio = sigma_s / sigma_t
    return (z_end.float() - ratio * z.float()) / (alpha_s - ratio * alpha_t)


def nested_steps(
    schedule: NoiseSchedule,
    student_scheduler: SchedulerMixin,
    steps: int,
    teacher_scheduler: SchedulerMixin,
    teacher_steps: int,
) -> Tensor:
    """[N, K]: row n holds the times of a student's step n: its start, the teacher's starts within, its end.

    On a flow and on EDM's σ the teacher's starts lie within the student's steps, whatever its own grid; a last step
    that starts with next to no noise is left out, for nothing is learnt of it. Raises ValueError where the student's
    starts are not among the teacher's, or the teacher's number of steps is no multiple of the student's.
    """
    if isinstance(schedule, RectifiedFlow | VarianceExploding):
        parts, left = divmod(teacher_steps, steps)
        if left or not parts:
            raise ValueError(f"a teacher's {teacher_steps} steps are no multiple of {steps}; it needs one, as 32 of 16")
        bounds_NK = schedule.within(schedule.grid(student_scheduler, steps), parts)
        return bounds_NK[schedule.alpha_sigma(bounds_NK[:, 0])[1] >= LEAST_SIGMA]
    starts_N, ends_N = schedule.grid(student_scheduler, steps).T
    teacher_starts, _ = schedule.grid(teacher_scheduler, teacher_steps).T
    per_step, left = divmod(teacher_steps, steps)
    if left or not per_step or not torch.equal(teacher_starts[::per_step], starts_N):
        spacing = student_scheduler.config.get("timestep_spacing")
        way_out = "" if spacing == "trailing" else ", and distillation.timestep_spacing=trailing"
        raise ValueError(
            f"{steps} steps do not nest in a teacher's {teacher_steps} with timestep_spacing={spacing!r}; the teacher "
            f"needs a multiple of them, as 32 of 16{way_out}"
        )
    return torch.cat([teacher_starts.view(steps, per_step), ends_N[:, None]], dim=1)
