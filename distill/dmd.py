"""Distribution matching distillation (Yin et al. 2024, arXiv 2311.18828; DMD2: arXiv 2405.14867).

The student's images of few steps, or one, are pulled to where the teacher finds images likelier than `fake_score` does,
a denoiser of the student's own images that is trained beside it. No teacher trajectory is needed.

Axes: B batch; samples are [B, …].
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from slimstep.distill.generation import Generated, Generation, Noisy, renoised
from slimstep.distill.teaching import StepSchedule, squared_error
from slimstep.engine.checks import check_minimum
from slimstep.engine.objective import STUDENT, Batch, Metrics, Requirements
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import Denoiser
from slimstep.models.noise_schedule import NoiseSchedule, each, target_of

FAKE_SCORE = "fake_score"
LEAST_SCALE = 1e-4


@dataclass(eq=False)
class DistributionMatching:
    """∇KL = E[(x̂_fake − x̂_real) / mean|x̂ − x̂_real|] (Yin et al. 2024, equations 7 and 8), x̂_real being the teacher's,
    guided by `guidance_scale`: the student is sampled without guidance.

    `fake_updates` are those of the fake score in each step, before the student's one; it begins as the teacher.
    Samples are compared at uniform shares of the way to noise within `time_range`.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    uncond: Conditioning
    teacher: nn.Module
    step_schedule: StepSchedule
    guidance_scale: float = 2.5
    fake_updates: int = 5
    time_range: tuple[float, float] = (0.02, 0.98)

    requires = Requirements(distils_steps=True, guides_itself=True, networks=(FAKE_SCORE,))

    def __post_init__(self) -> None:
        check_minimum("objective", self, 1, "fake_updates", "guidance_scale")
        low, high = self.time_range
        if not 0 < low < high < 1:
            raise ValueError(f"objective.time_range={list(self.time_range)} must be two shares, 0 < low < high < 1")
        device = next(self.teacher.parameters()).device
        self.generation = Generation.of(self.denoiser, self.schedule, self.step_schedule, device, self.guidance_scale)

    @cached_property
    def networks(self) -> Mapping[str, nn.Module]:
        return {FAKE_SCORE: copy.deepcopy(self.teacher).float().requires_grad_()}

    def updates(self, step: int) -> Sequence[str]:
        return (FAKE_SCORE,) * self.fake_updates + (STUDENT,)

    def loss(
        self, networks: Mapping[str, nn.Module], batch: Batch, generator: torch.Generator, update: str
    ) -> tuple[Tensor, Metrics]:
        with torch.set_grad_enabled(update == STUDENT):
            generated = self.generation(networks[STUDENT], batch, self.uncond, generator)
        if update == FAKE_SCORE:
            return self.denoising(networks[FAKE_SCORE], generated, generator), {}
        return self.matching(networks[FAKE_SCORE], generated, generator, batch)

    def denoising(self, fake_score: nn.Module, generated: Generated, generator: torch.Generator) -> Tensor:
        """The denoising loss of the student's samples."""
        noisy, kind = renoised(generated, self.schedule, self.time_range, generator), self.schedule.prediction_type
        pred = self.generation.predict(fake_score, noisy.z, noisy.t_B, noisy.cond)
        return nn.functional.mse_loss(pred, target_of(generated.x0, noisy.noise, noisy.level, kind))

    def matching(
        self, fake_score: nn.Module, generated: Generated, generator: torch.Generator, batch: Batch
    ) -> tuple[Tensor, Metrics]:
        """½‖x̂ − (x̂ − direction)‖² with a fixed second term, whose gradient is the direction.

        Metrics: `direction`, its mean size, and `spread`, the samples' standard deviation over the batch in units of
        the training images'; where it falls, samples become alike.
        """
        with torch.no_grad():
            noisy = renoised(generated, self.schedule, self.time_range, generator)
            real, fake = self.real(noisy), self.generation.x0(fake_score, noisy)
            scale_B = (generated.x0 - real).abs().flatten(1).mean(1).clamp(min=LEAST_SCALE)
            direction = (fake - real) / each(scale_B, fake)
            spread = generated.x0.std(0).mean() / batch["latents"].std(0).mean()
        loss = 0.5 * squared_error(generated.x0, (generated.x0 - direction).detach()).mean()
        return loss, {"direction": direction.abs().mean(), "spread": spread}

    def real(self, noisy: Noisy) -> Tensor:
        """x̂ of the guided teacher."""
        return self.generation.x0(self.teacher, noisy, self.uncond)
