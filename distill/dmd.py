"""Distribution matching distillation (Yin et al. 2023, arXiv 2311.18828; DMD2: arXiv 2405.14867).

The student's images of few steps, or one, are pulled to where the teacher finds images likelier than `fake_score` does,
a denoiser of the student's own images that is trained beside it. No teacher trajectory is needed.

Axes: B batch; samples are [B, …].
"""

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from slimstep.distill.discriminator import DISCRIMINATOR, AdversarialLoss
from slimstep.distill.generation import SPREAD, Generated, Generation, Noisy, check_time_range, renoised, spread
from slimstep.distill.teaching import StepSchedule, squared_error
from slimstep.engine.checks import check_fraction, check_minimum, check_not_negative
from slimstep.engine.low_rank import add_low_rank, check_peft
from slimstep.engine.objective import STUDENT, Batch, Cost, Metrics, Requirements
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import Denoiser
from slimstep.models.noise_schedule import NoiseSchedule, each, target_of

FAKE_SCORE = "fake_score"
LEAST_SCALE = 1e-4


@dataclass(eq=False)
class DistributionMatching:
    """∇KL = E[(x̂_fake − x̂_real) / mean|x̂ − x̂_real|] (DMD, equations 7 and 8), x̂_real being the teacher's, guided by
    `guidance_scale`: the student is sampled without guidance.

    `fake_updates` are those of the fake score in each step, before the student's one; it begins as the teacher. All of
    a step see the same samples, each with new noise: the student does not change between them. With `fresh_samples`
    each has its own, as DMD2's. With `fake_lora_rank` the fake score is the teacher's weights and a low-rank update, so
    that no third network is in memory.
    `teacher_mix` is FastLightGen's β (arXiv 2603.01685): that share of x̂_real is the student's as it was before the
    distillation, with its many steps; 0 is the teacher alone. `adversarial_weight` above 0 adds DMD2's loss of a
    discriminator, on the teacher's features. Samples are compared at uniform shares of the way to noise within
    `time_range`.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    uncond: Conditioning
    teacher: nn.Module
    step_schedule: StepSchedule
    initial_student: Callable[[], nn.Module]
    guidance_scale: float = 2.5
    fake_updates: int = 2
    fresh_samples: bool = False
    fake_lora_rank: int = 0
    teacher_mix: float = 0.0
    adversarial_weight: float = 0.0
    r1_weight: float = 1e-5
    time_range: tuple[float, float] = (0.02, 0.98)

    requires = Requirements(
        distils_steps=True, guides_itself=True, own_times_only=True, initial_student=True, networks=(FAKE_SCORE,),
        limits=SPREAD,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_minimum("objective", self, 1, "fake_updates", "guidance_scale")
        check_fraction("objective", teacher_mix=self.teacher_mix)
        weights = {"adversarial_weight": self.adversarial_weight, "r1_weight": self.r1_weight}
        check_not_negative("objective", fake_lora_rank=self.fake_lora_rank, **weights)
        check_peft("objective.fake_lora_rank", self.fake_lora_rank)
        check_time_range(self.time_range)
        shared = self.denoiser, self.schedule, self.step_schedule, self.teacher
        self.generation = Generation.of(*shared, self.guidance_scale)
        self.adversarial = AdversarialLoss(self.generation, self.teacher, self.time_range, self.r1_weight)
        if self.adversarial_weight:
            self.requires = replace(self.requires, feature_hooks=True, networks=(FAKE_SCORE, DISCRIMINATOR))
        self.kept: deque[Generated] = deque()  # a step's samples for the fake score, one of each micro-batch

    @property
    def cost(self) -> Cost:
        before, updates, discriminators = self.generation.rows_before, self.fake_updates, bool(self.adversarial_weight)
        drawn = (updates if self.fresh_samples else 1) + discriminators  # without a gradient; the student's own has one
        rows = (drawn + 1) * before + drawn + 2 + bool(self.teacher_mix) + 2 * discriminators
        weights = 0 if self.fake_lora_rank else sum(p.numel() for p in self.teacher.parameters())
        return Cost(rows, updates + 1 + discriminators, weights)

    @cached_property
    def networks(self) -> Mapping[str, nn.Module]:
        return {name: self.made(name) for name in self.requires.networks}

    def made(self, name: str) -> nn.Module:
        if name == DISCRIMINATOR:
            return self.adversarial.discriminator(seed=0)
        if not self.fake_lora_rank:
            return copy.deepcopy(self.teacher).float().requires_grad_()
        shared = copy.deepcopy(self.teacher, {id(parameter): parameter for parameter in self.teacher.parameters()})
        add_low_rank(shared, self.fake_lora_rank, seed=0)
        return shared

    @cached_property
    def second_teacher(self) -> nn.Module:
        return self.initial_student()

    def updates(self, step: int) -> Sequence[str]:
        return (FAKE_SCORE,) * self.fake_updates + (DISCRIMINATOR,) * bool(self.adversarial_weight) + (STUDENT,)

    def loss(
        self, networks: Mapping[str, nn.Module], batch: Batch, generator: torch.Generator, update: str
    ) -> tuple[Tensor, Metrics]:
        if update == FAKE_SCORE:
            generated = self.samples(networks[STUDENT], batch, generator)
            noisy = self.renoised(generated, generator)
            return self.denoising(networks[FAKE_SCORE], generated, noisy), {}
        self.kept.clear()
        with torch.set_grad_enabled(update == STUDENT):
            generated = self.generation(networks[STUDENT], batch, self.uncond, generator)
        if update == DISCRIMINATOR:
            return self.adversarial.of_discriminator(networks[DISCRIMINATOR], generated, batch, generator)
        noisy = self.renoised(generated, generator)
        matching, size = self.matching(networks[FAKE_SCORE], generated, noisy)
        metrics = {"direction": size, "spread": spread(generated, batch)}
        if not self.adversarial_weight:
            return matching, metrics
        adversarial = self.adversarial.of_student(networks[DISCRIMINATOR], noisy)
        metrics |= {"matching": matching, "adversarial": adversarial}
        return matching + self.adversarial_weight * adversarial, metrics

    @torch.no_grad()
    def samples(self, student: nn.Module, batch: Batch, generator: torch.Generator) -> Generated:
        """What the fake score learns of in this update: new samples in its first one of a step."""
        if self.fresh_samples:
            return self.generation(student, batch, self.uncond, generator)
        if batch["nth"] == 0:
            self.kept.append(self.generation(student, batch, self.uncond, generator))
            return self.kept[-1]
        self.kept.rotate(-1)
        return self.kept[-1]

    def renoised(self, generated: Generated, generator: torch.Generator) -> Noisy:
        """The samples as they are compared."""
        return renoised(generated, self.schedule, self.time_range, generator)

    def denoising(self, fake_score: nn.Module, generated: Generated, noisy: Noisy) -> Tensor:
        """The denoising loss of the student's samples."""
        pred = self.generation.predict(fake_score, noisy.z, noisy.t_B, noisy.cond)
        kind = self.schedule.prediction_type
        return nn.functional.mse_loss(pred, target_of(generated.x0, noisy.noise, noisy.level, kind))

    def matching(self, fake_score: nn.Module, generated: Generated, noisy: Noisy) -> tuple[Tensor, Tensor]:
        """½‖x̂ − (x̂ − direction)‖² with a fixed second term, whose gradient is the direction; and its mean size."""
        with torch.no_grad():
            real, fake = self.real(noisy), self.generation.x0(fake_score, noisy)
            scale_B = (generated.x0 - real).abs().flatten(1).mean(1).clamp(min=LEAST_SCALE)
            direction = (fake - real) / each(scale_B, fake)
            target = generated.x0 - direction
        return 0.5 * squared_error(generated.x0, target).mean(), direction.abs().mean()

    def real(self, noisy: Noisy) -> Tensor:
        """x̂ of the guided teacher, or of the mixture of both teachers."""
        x0 = self.generation.x0(self.teacher, noisy, self.uncond)
        if not self.teacher_mix:
            return x0
        return torch.lerp(x0, self.generation.x0(self.second_teacher, noisy, self.uncond), self.teacher_mix)
