"""Adversarial diffusion distillation in latents (ADD, Sauer et al. 2023, arXiv 2311.17042; LADD, arXiv 2403.12015)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from slimstep.distill.discriminator import DISCRIMINATOR, AdversarialLoss
from slimstep.distill.generation import SPREAD, Generation, check_time_range, renoised, spread
from slimstep.distill.teaching import StepSchedule, squared_error
from slimstep.engine.checks import check_minimum, check_not_negative
from slimstep.engine.objective import STUDENT, Batch, Cost, Metrics, Requirements
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import Denoiser
from slimstep.models.noise_schedule import NoiseSchedule


@dataclass(eq=False)
class AdversarialDistillation:
    """The student's samples have to look real to a discriminator on the frozen teacher's features.

    `distillation_weight` is ADD's λ: beside it x̂ is drawn to what the guided teacher makes of it, with noise, weighted
    by α (ADD, equation 4); 0 is LADD. `discriminator_updates` are those in each step, before the student's one.
    Samples are compared at uniform shares of the way to noise within `time_range`.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    uncond: Conditioning
    teacher: nn.Module
    step_schedule: StepSchedule
    guidance_scale: float = 2.5
    distillation_weight: float = 2.5
    discriminator_updates: int = 1
    r1_weight: float = 1e-5
    time_range: tuple[float, float] = (0.02, 0.98)

    requires = Requirements(
        distils_steps=True, guides_itself=True, own_times_only=True, feature_hooks=True, networks=(DISCRIMINATOR,),
        limits=SPREAD,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_minimum("objective", self, 1, "discriminator_updates", "guidance_scale")
        weights = {"distillation_weight": self.distillation_weight, "r1_weight": self.r1_weight}
        check_not_negative("objective", **weights)
        check_time_range(self.time_range)
        shared = self.denoiser, self.schedule, self.step_schedule, self.teacher
        self.generation = Generation.of(*shared, self.guidance_scale)
        self.adversarial = AdversarialLoss(self.generation, self.teacher, self.time_range, self.r1_weight)

    @property
    def cost(self) -> Cost:
        before, updates = self.generation.rows_before, self.discriminator_updates
        rows = (updates + 1) * before + 3 * updates + bool(self.distillation_weight)
        return Cost(rows, 2)  # the student's, and the teacher's through which its gradient goes

    @cached_property
    def networks(self) -> Mapping[str, nn.Module]:
        return {DISCRIMINATOR: self.adversarial.discriminator(seed=0)}

    def updates(self, step: int) -> Sequence[str]:
        return (DISCRIMINATOR,) * self.discriminator_updates + (STUDENT,)

    def loss(
        self, networks: Mapping[str, nn.Module], batch: Batch, generator: torch.Generator, update: str
    ) -> tuple[Tensor, Metrics]:
        with torch.set_grad_enabled(update == STUDENT):
            generated = self.generation(networks[STUDENT], batch, self.uncond, generator)
        if update == DISCRIMINATOR:
            return self.adversarial.of_discriminator(networks[DISCRIMINATOR], generated, batch, generator)
        noisy = renoised(generated, self.schedule, self.time_range, generator)
        adversarial = self.adversarial.of_student(networks[DISCRIMINATOR], noisy)
        metrics = {"adversarial": adversarial, "spread": spread(generated, batch)}
        if not self.distillation_weight:
            return adversarial, metrics
        with torch.no_grad():
            target = self.generation.x0(self.teacher, noisy, self.uncond)
        alpha_B, _ = noisy.level
        distillation = (alpha_B * squared_error(generated.x0, target)).mean()
        return adversarial + self.distillation_weight * distillation, {**metrics, "distillation": distillation}
