"""Latent consistency distillation: students for diffusers' LCMScheduler.

Axes: B batch, N steps of the grid, K bounds of a step, C channels, H and W latent size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimstep.distill.teaching import StepSchedule, draw_guidance, draw_steps, validate_range
from slimstep.engine.objective import Batch, Cost, Metrics, Requirements
from slimstep.models.conditioning import Conditioning, conditioning_of
from slimstep.models.denoiser import Denoiser, guidance_embed_dim
from slimstep.models.guidance import guided
from slimstep.models.noise_schedule import VariancePreserving, ddim_step, each, nested_steps, x0_of


@dataclass(eq=False)
class ConsistencyDistillation:
    """Latent consistency distillation (Luo et al. 2023): along one guided teacher step the student's prediction stays.

    `grid_steps` is LCMScheduler's `original_inference_steps`; on a trailing grid that divides T they are DDIM's steps,
    whatever the stage's number of steps: one student serves all. The teacher has no guidance embedding. The student's
    prediction is f(z, t) = c_skip·z + c_out·x̂ with the scalings LCMScheduler samples by; the target is its own at the
    further end, without gradient. The loss is the pseudo-Huber distance.
    """

    denoiser: Denoiser
    schedule: VariancePreserving
    uncond: Conditioning
    teacher: nn.Module
    step_schedule: StepSchedule
    grid_steps: int = 50
    guidance_range: tuple[float, float] = (1.0, 8.0)
    huber: float = 0.001

    requires = Requirements(
        distils_steps=True,
        sampler="LCMScheduler",
        sampler_options={"original_inference_steps": "grid_steps"},
        guidance_embedding=True,
    )
    DATA_STD, TIMESTEP_SCALING = 0.5, 10.0

    def __post_init__(self) -> None:
        schedule, steps, scheduler = self.schedule, self.grid_steps, self.step_schedule.teacher_scheduler
        if guidance_embed_dim(self.teacher):
            raise ValueError("objective=lcm has one stage, as distillation.steps=[32,4]: its student is no teacher")
        grid = nested_steps(schedule, scheduler, steps, scheduler, steps)
        if len(schedule) % steps or grid[0, 0] != len(schedule) - 1:
            raise ValueError(f"objective.grid_steps={steps} must divide {len(schedule)}, on a trailing grid")
        self.bounds_NK = grid.to(next(self.teacher.parameters()).device)
        validate_range(self.guidance_range)

    cost = Cost(rows=1)

    def consistency(self, unet: nn.Module, z_BCHW: Tensor, t_B: Tensor, cond: Conditioning, w_B: Tensor) -> Tensor:
        """f(z, t): clean latents; z itself at t = 0."""
        level, kind = self.schedule.alpha_sigma(t_B), self.schedule.prediction_type
        x0_BCHW = x0_of(self.denoiser(unet, z_BCHW, t_B, cond, guidance_B=w_B), z_BCHW, level, kind)
        scaled_B111 = self.TIMESTEP_SCALING * each(t_B, z_BCHW)
        variance_B111 = scaled_B111**2 + self.DATA_STD**2
        return self.DATA_STD**2 / variance_B111 * z_BCHW + scaled_B111 / variance_B111**0.5 * x0_BCHW

    def __call__(self, unet: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        schedule = self.schedule
        draw = draw_steps(batch, schedule, self.bounds_NK, conditioning_of(batch, like=self.uncond), generator)
        w_B = draw_guidance(len(draw.t_B), self.guidance_range, generator)
        with torch.no_grad():
            inputs = draw.z_BCHW, draw.t_B, draw.cond
            guided_BCHW, _ = guided(self.denoiser, self.teacher, *inputs, self.uncond, w_B)
            start, end = schedule.alpha_sigma(draw.t_B), schedule.alpha_sigma(draw.end_B)
            z_s_BCHW = ddim_step(guided_BCHW, draw.z_BCHW, start, end, schedule.prediction_type)
            target_BCHW = self.consistency(unet, z_s_BCHW, draw.end_B.clamp(min=0), draw.cond, w_B)
        pred_BCHW = self.consistency(unet, draw.z_BCHW, draw.t_B, draw.cond, w_B)
        loss = (((pred_BCHW - target_BCHW) ** 2 + self.huber**2) ** 0.5 - self.huber).mean()
        return loss, {}
