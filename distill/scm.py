"""Continuous-time consistency distillation (sCM, Lu & Song 2024, arXiv 2410.11081), for every schedule of ours.

A level (α, σ) is an angle: φ = atan2(σ, α), and x_φ = z / √(α² + σ²) = cos φ x0 + sin φ ε, whatever the network was
trained on (TrigFlow; SANA-Sprint, arXiv 2503.09641, section 3.1). F = cos φ ε̂ − sin φ x̂ is the velocity dx_φ/dφ.

Axes: B batch; samples are [B, …].
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimstep.distill.generation import Generation, Noisy
from slimstep.distill.teaching import StepSchedule, squared_error
from slimstep.engine.checks import check_choice, check_fraction, check_minimum, check_not_negative
from slimstep.engine.objective import Batch, Cost, Metrics, Requirements
from slimstep.models.conditioning import Conditioning, conditioning_of
from slimstep.models.denoiser import Denoiser
from slimstep.models.noise_schedule import Level, NoiseSchedule, VarianceExploding, add_noise, each

TANGENTS = ("difference", "jvp")
NORM_FLOOR = 0.1  # c of g / (‖g‖ + c)


@dataclass(eq=False)
class ContinuousConsistency:
    """‖F_θ − (F_θ⁻ + g / (‖g‖ + c))‖², g = −cos²φ (F_θ⁻ − dx_φ/dφ) − r cos φ sin φ (x_φ + dF_θ⁻/dφ) (sCM, equation 8).

    dx_φ/dφ is the teacher's F, guided by `guidance_scale`: the student is sampled without guidance. r rises from 0 to 1
    within the share `tangent_warmup` of the training. dF_θ⁻/dφ along the teacher's path is a `difference` over the
    share `step` of the way to noise, a timestep at least, or a `jvp`, exact, which needs forward-mode derivatives of
    every operation. A share `start_share` of the samples is at the starts of the student's own steps; the others at
    uniform shares of the way within `time_range`.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    uncond: Conditioning
    teacher: nn.Module
    step_schedule: StepSchedule
    guidance_scale: float = 2.5
    tangent: str = "difference"
    step: float = 0.005
    tangent_warmup: float = 0.2
    start_share: float = 0.5
    time_range: tuple[float, float] = (0.02, 1.0)

    requires = Requirements(distils_steps=True, guides_itself=True)

    def __post_init__(self) -> None:
        check_choice("objective", self, tangent=TANGENTS)
        check_minimum("objective", self, 1, "guidance_scale")
        check_fraction("objective", tangent_warmup=self.tangent_warmup, start_share=self.start_share)
        check_not_negative("objective", step=self.step)
        low, high = self.time_range
        if not 0 < self.step < low < high <= 1:
            way = f"0 < step={self.step} < low < high <= 1"
            raise ValueError(f"objective.time_range={list(self.time_range)} must be two shares, {way}")
        shared = self.denoiser, self.schedule, self.step_schedule, self.teacher
        self.generation = Generation.of(*shared, self.guidance_scale)

    @property
    def cost(self) -> Cost:
        return Cost(2)  # the teacher's, and the student's own a little closer to the sample

    def __call__(self, unet: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        x0, cond = batch["latents"], conditioning_of(batch, like=self.uncond)
        draw: dict[str, Any] = {"generator": generator, "device": x0.device}
        t_B, before_B = self.times(len(x0), generator)
        noise, level = torch.randn(x0.shape, **draw), self.schedule.alpha_sigma(t_B)
        noisy = Noisy(add_noise(x0, noise, level), noise, t_B, level, cond)
        F = self.velocity(unet, noisy)
        with torch.no_grad():
            path = self.velocity(self.teacher, noisy, self.uncond)
            slope = getattr(self, self.tangent)(unet, noisy, F, path, before_B)
            target = F + self.direction(F, path, slope, noisy, batch["progress"])
        return squared_error(F, target).mean(), {}

    def times(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """[B] times of the samples, and times a little closer to the sample."""
        draw: dict[str, Any] = {"generator": generator, "device": generator.device}
        low, high = self.time_range
        t_B = self.schedule.time_at(low + (high - low) * torch.rand(rows, **draw))
        starts_N = self.generation.bounds_N2[:, 0].to(t_B)
        start_B = starts_N[torch.randint(len(starts_N), (rows,), **draw)]
        t_B = torch.where(torch.rand(rows, **draw) < self.start_share, start_B, t_B)
        if isinstance(self.schedule, VarianceExploding):  # its times are a logarithm: a share is no length of them
            return t_B, self.schedule.time_at(self.schedule.share_at(t_B) - self.step)
        least = 0 if t_B.is_floating_point() else 1  # timestep
        return t_B, t_B - self.schedule.time_at(torch.full((rows,), self.step, device=t_B.device)).clamp(min=least)

    def velocity(self, network: nn.Module, noisy: Noisy, uncond: Conditioning | None = None) -> Tensor:
        """F of a network, guided where `uncond` is given."""
        return velocity_of(self.generation.x0(network, noisy, uncond), noisy)

    def direction(self, F: Tensor, path: Tensor, slope: Tensor, noisy: Noisy, progress: float) -> Tensor:
        """g / (‖g‖ + c), with the norm of a sample of unit variance for 1."""
        cos, sin = (each(x_B, F) for x_B in cos_sin(noisy.level))
        warmth = min(1.0, progress / self.tangent_warmup) if self.tangent_warmup else 1.0
        g = -(cos**2) * (F - path) - warmth * cos * sin * (along(noisy) + slope)
        return g / (each(g.square().flatten(1).mean(1).sqrt(), g) + NORM_FLOOR)

    def difference(self, unet: nn.Module, noisy: Noisy, F: Tensor, path: Tensor, before_B: Tensor) -> Tensor:
        """dF/dφ, as a difference to where the teacher's path was a little closer to the sample."""
        before = self.schedule.alpha_sigma(before_B)
        turn = each(angle(noisy.level) - angle(before), F)
        x_before = turn.cos() * along(noisy) - turn.sin() * path
        moved = replace(noisy, z=each(size(before), F) * x_before, t_B=before_B, level=before)
        return (F - self.velocity(unet, moved)) / turn

    def jvp(self, unet: nn.Module, noisy: Noisy, F: Tensor, path: Tensor, before_B: Tensor) -> Tensor:
        """dF/dφ, exactly but for how a time and its size depend on the angle, which is a difference."""
        unet, before = extract_model_from_parallel(unet, keep_torch_compile=False), self.schedule.alpha_sigma(before_B)
        start_B = angle(noisy.level)
        turn_B = start_B - angle(before)
        time_slope_B = (noisy.t_B - before_B) / turn_B
        size_slope_B = (size(noisy.level) - size(before)) / turn_B

        def velocity(x: Tensor, angle_B: Tensor) -> Tensor:
            ahead_B = angle_B - start_B
            size_B = size(noisy.level) + ahead_B * size_slope_B
            level = size_B * angle_B.cos(), size_B * angle_B.sin()
            t_B = noisy.t_B + ahead_B * time_slope_B
            return self.velocity(unet, replace(noisy, z=each(size_B, x) * x, t_B=t_B, level=level))

        with sdpa_kernel(SDPBackend.MATH):  # the only one with forward-mode derivatives
            slope = torch.func.jvp(velocity, (along(noisy), start_B), (path, torch.ones_like(start_B)))[1]
        return slope


def angle(level: Level) -> Tensor:
    """φ [B], from 0 at the sample to π/2 at noise."""
    alpha_B, sigma_B = level
    return torch.atan2(sigma_B, alpha_B)


def size(level: Level) -> Tensor:
    """√(α² + σ²) [B], by which z is larger than x_φ."""
    return torch.hypot(*level)


def cos_sin(level: Level) -> tuple[Tensor, Tensor]:
    alpha_B, sigma_B = level
    return alpha_B / size(level), sigma_B / size(level)


def along(noisy: Noisy) -> Tensor:
    """x_φ."""
    return noisy.z / each(size(noisy.level), noisy.z)


def velocity_of(x0: Tensor, noisy: Noisy) -> Tensor:
    """F of what is predicted for the sample: (cos φ x_φ − x̂) / sin φ."""
    cos, sin = (each(x_B, x0) for x_B in cos_sin(noisy.level))
    return (cos * along(noisy) - x0) / sin
