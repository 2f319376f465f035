"""Guided distillation: one evaluation per step, by a UNet that is told its guidance scale.

Axes: B batch, N steps of the student, K bounds of a step, C channels, H and W latent size.
"""

import torch
from torch import Tensor, nn

from slimstep.distill.teaching import (
    Rung,
    draw_guidance,
    draw_steps,
    error_in_x,
    known_range,
    known_weighting,
    teacher_target,
)
from slimstep.engine.objective import Batch, Metrics, Requirements
from slimstep.models.conditioning import Conditioning, conditioning_of
from slimstep.models.denoiser import Denoiser
from slimstep.models.noise_schedule import NoiseSchedule


class GuidanceDistillation:
    """Guided distillation (Meng et al. 2023): the student is told the guidance scale, and needs one evaluation a step.

    The teacher is guided with w ~ U[guidance_range] per row, or is told w where it is such a student itself. With as
    many steps as the teacher the student learns the guidance alone (their first stage).
    """

    requires = Requirements(distils_steps=True, guidance_embedding=True)

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        uncond: Conditioning,
        teacher: nn.Module,
        rung: Rung,
        guidance_range: tuple[float, float] = (1.0, 8.0),
        weighting: str = "relative",
    ):
        self.denoiser, self.schedule, self.uncond, self.teacher = denoiser, schedule, uncond, teacher
        self.bounds_NK = rung.bounds(schedule).to(next(teacher.parameters()).device)
        self.guidance_range, self.weighting = known_range(guidance_range), known_weighting(weighting, rung)

    def __call__(self, unet: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        schedule = self.schedule
        draw = draw_steps(batch, schedule, self.bounds_NK, conditioning_of(batch, like=self.uncond), generator)
        w_B = draw_guidance(len(draw.t_B), self.guidance_range, generator)
        target = teacher_target(self.denoiser, self.teacher, schedule, draw, self.uncond, w_B)
        pred_BCHW = self.denoiser(unet, draw.z_BCHW, draw.t_B, draw.cond, guidance_B=w_B)
        return error_in_x(pred_BCHW, target, draw, schedule, self.weighting), {}
