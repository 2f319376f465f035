"""What a user writes to add an objective with a second network: this file, and objective/matching.yaml beside it."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from slimstep.distill.teaching import StepSchedule
from slimstep.engine.objective import STUDENT, Batch, Metrics, Requirements
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import Denoiser
from slimstep.models.denoising import draw_noisy
from slimstep.models.noise_schedule import NoiseSchedule


class Matching:
    """A sketch of distribution matching: `fake_score`, from the teacher's weights, learns to denoise as the student
    does, and the student goes where the teacher's prediction is from there."""

    requires = Requirements(distils_steps=True, networks=("fake_score",))

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        uncond: Conditioning,
        teacher: nn.Module,
        step_schedule: StepSchedule,
        score_updates: int = 2,
    ):
        self.denoiser, self.schedule, self.uncond, self.teacher = denoiser, schedule, uncond, teacher
        self.networks = {"fake_score": copy.deepcopy(teacher).float().requires_grad_()}
        self.score_updates = score_updates

    def updates(self, step: int) -> Sequence[str]:
        return ("fake_score",) * self.score_updates + (STUDENT,)

    def loss(
        self, networks: Mapping[str, nn.Module], batch: Batch, generator: torch.Generator, update: str
    ) -> tuple[Tensor, Metrics]:
        noisy = draw_noisy(batch, self.schedule, self.uncond, 0.0, generator)
        with torch.set_grad_enabled(update == STUDENT):
            student = self.denoiser(networks[STUDENT], *noisy.inputs)
        with torch.set_grad_enabled(update != STUDENT):
            fake = self.denoiser(networks["fake_score"], *noisy.inputs)
        if update != STUDENT:
            return nn.functional.mse_loss(fake, student), {}
        with torch.no_grad():
            real = self.denoiser(self.teacher, *noisy.inputs)
        return nn.functional.mse_loss(student, (student - fake + real).detach()), {}
