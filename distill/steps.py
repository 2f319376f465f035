"""Step distillation (SnapFusion, section 4): one step of the student lands where several of the teacher land.

Axes: B batch, G guided rows, N steps of the student, K bounds of a step, C channels, H and W latent size.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from slimstep.distill.teaching import (
    Draw,
    StepSchedule,
    Target,
    draw_guidance,
    draw_steps,
    drop_captions,
    error_in_x,
    teacher_target,
    validate_range,
    validate_weighting,
)
from slimstep.engine.checks import check_fraction, check_not_negative
from slimstep.engine.objective import Batch, CachedTargets, Metrics, Requirements
from slimstep.models.conditioning import Conditioning, conditioning_of
from slimstep.models.denoiser import Denoiser
from slimstep.models.guidance import guided
from slimstep.models.noise_schedule import NoiseSchedule, add_noise, target_of


@dataclass(eq=False)
class StepDistillation:
    """L_dstl + γ·L_ori (SnapFusion, section 4): vanilla step distillation, CFG-aware in some rows.

    A row is guided on both sides with probability `guided_share`, the paper's p (there a coin per iteration), and w ~
    U[guidance_range]; so that shapes are fixed, coins are thrown for the first rows only. 0 is the vanilla loss, 1 the
    CFG-aware. `original_weight` is γ: L_ori, the denoising loss, here at the starts of the student's steps, is brought
    to the size of L_dstl first. `weighting` is `truncated_snr` in the paper; `relative` makes the loss the share of the
    teacher's own error that is left. `caption_dropout` empties captions of rows that are never guided, so that the
    unconditional branch is distilled, too. With `cached_draws` every image has that many fixed noises and steps, whose
    teacher targets are computed once, before the training (vanilla only: `guided_share` 0).
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    uncond: Conditioning
    teacher: nn.Module
    step_schedule: StepSchedule
    guided_share: float = 0.1
    guidance_range: tuple[float, float] = (2.0, 14.0)
    weighting: str = "relative"
    original_weight: float = 0.2
    caption_dropout: float = 0.1
    cached_draws: int = 0

    requires = Requirements(distils_steps=True)

    def __post_init__(self) -> None:
        share, draws = self.guided_share, self.cached_draws
        check_fraction("objective", guided_share=share, caption_dropout=self.caption_dropout)
        check_not_negative("objective", original_weight=self.original_weight, cached_draws=draws)
        if draws and share:
            raise ValueError(f"objective.cached_draws={draws} needs guided_share=0, and it is {share}")
        self.bounds_NK = self.step_schedule.bounds(self.schedule).to(next(self.teacher.parameters()).device)
        validate_range(self.guidance_range)
        validate_weighting(self.weighting, self.step_schedule)
        if draws:
            cached = CachedTargets(draws, len(self.bounds_NK), self.caption_dropout, self.compute_targets)
            self.requires = replace(self.requires, cached_targets=cached)

    def __call__(self, unet: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        schedule, rows = self.schedule, len(batch["latents"])
        if self.cached_draws:
            draw, target, w_G = self.cached_draw(batch), Target(batch["target"], batch["gap"]), self.unguided
        else:
            guided_rows = math.ceil(self.guided_share * rows)
            cond = drop_captions(batch, self.uncond, self.caption_dropout, guided_rows, generator)
            draw = draw_steps(batch, schedule, self.bounds_NK, cond, generator)
            w_G = self.draw_guidance(guided_rows, rows, generator)
            given = draw, self.uncond, w_G, self.step_schedule.limit
            target = teacher_target(self.denoiser, self.teacher, schedule, *given)
        inputs = draw.z_BCHW, draw.t_B, draw.cond
        guided_BCHW, plain_BCHW = guided(self.denoiser, unet, *inputs, self.uncond, w_G)
        distillation = error_in_x(guided_BCHW, target, draw, schedule, self.weighting)
        level = schedule.alpha_sigma(draw.t_B)
        denoised_BCHW = target_of(draw.x0_BCHW, draw.noise_BCHW, level, schedule.prediction_type)
        original = nn.functional.mse_loss(plain_BCHW, denoised_BCHW)
        scale = self.original_weight * distillation.detach() / original.detach()
        return distillation + scale * original, {"distillation": distillation, "original": original}

    @property
    def unguided(self) -> Tensor:
        """No guidance scales at all."""
        return torch.zeros(0, device=self.bounds_NK.device)

    def cached_draw(self, batch: Batch) -> Draw:
        """The noisy latents of a batch of distill.cached_targets.TargetInputs."""
        x0_BCHW, noise_BCHW, bounds_BK = batch["latents"], batch["noise"], self.bounds_NK[batch["step"]]
        z_BCHW = add_noise(x0_BCHW, noise_BCHW, self.schedule.alpha_sigma(bounds_BK[:, 0]))
        return Draw(x0_BCHW, noise_BCHW, z_BCHW, bounds_BK, conditioning_of(batch, like=self.uncond))

    def compute_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher target x̃ [B, C, H, W] of fixed draws, and the gap [B] of the teacher's own single step."""
        draw = self.cached_draw(batch)
        given = draw, self.uncond, self.unguided, self.step_schedule.limit
        target = teacher_target(self.denoiser, self.teacher, self.schedule, *given)
        return target.x0_BCHW, target.gap_B

    def draw_guidance(self, guided_rows: int, rows: int, generator: torch.Generator) -> Tensor:
        """w of the rows that may be guided; 1, which is no guidance, where the coin says so."""
        w_G = draw_guidance(guided_rows, self.guidance_range, generator)
        coin_G = torch.rand(guided_rows, generator=generator, device=generator.device) * guided_rows
        return torch.where(coin_G < self.guided_share * rows, w_G, 1.0)
