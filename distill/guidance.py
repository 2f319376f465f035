"""Guided distillation: one evaluation per step, by a UNet with a guidance embedding.

Axes: B batch, N steps of the student, K bounds of a step, C channels, H and W latent size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimstep.distill.teaching import (
    StepSchedule,
    draw_guidance,
    draw_steps,
    error_in_x,
    teacher_target,
    validate_range,
    validate_weighting,
)
from slimstep.engine.objective import Batch, Metrics, Requirements
from slimstep.models.conditioning import Conditioning, conditioning_of
from slimstep.models.denoiser import Denoiser
from slimstep.models.noise_schedule import NoiseSchedule


@dataclass(eq=False)
class GuidanceDistillation:
    """Guided distillation (Meng et al. 2023): a student with a guidance embedding needs one evaluation a step.

    The teacher is guided with w ~ U[guidance_range] per row, by its guidance embedding where it has one. With as
    many steps as the teacher the student learns the guidance alone (their first stage).
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    uncond: Conditioning
    teacher: nn.Module
    step_schedule: StepSchedule
    guidance_range: tuple[float, float] = (1.0, 8.0)
    weighting: str = "relative"

    requires = Requirements(distils_steps=True, guidance_embedding=True)

    def __post_init__(self) -> None:
        self.bounds_NK = self.step_schedule.bounds(self.schedule).to(next(self.teacher.parameters()).device)
        validate_range(self.guidance_range)
        validate_weighting(self.weighting, self.step_schedule)

    def __call__(self, unet: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        schedule = self.schedule
        draw = draw_steps(batch, schedule, self.bounds_NK, conditioning_of(batch, like=self.uncond), generator)
        w_B = draw_guidance(len(draw.t_B), self.guidance_range, generator)
        given = draw, self.uncond, w_B, self.step_schedule.limit
        target = teacher_target(self.denoiser, self.teacher, schedule, *given)
        pred_BCHW = self.denoiser(unet, draw.z_BCHW, draw.t_B, draw.cond, guidance_B=w_B)
        return error_in_x(pred_BCHW, target, draw, schedule, self.weighting), {}
