"""Small networks of every family with the grid of a student of few steps, for tests of what is distilled at once."""

import copy
from itertools import count

import torch
from diffusers import EDMEulerScheduler

from slimstep.distill.dmd import DistributionMatching
from slimstep.distill.generation import Generated, Generation
from slimstep.distill.teaching import StepSchedule
from slimstep.engine.seeding import generator as seeded
from slimstep.models.conditioning import Conditioning
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.family import denoiser_of, schedule_for
from slimstep.models.flow import eulers, stretched
from slimstep.models.noise_schedule import schedule_of
from slimstep.models.sizes import set_resolution
from tests.distill.test_teaching import scheduler
from tests.models.conftest import small_stock_unet
from tests.models.families.small import PIPELINES, PRUNABLE, STOCK


class World:
    """A small network with its schedule, and the grid of a student of so many steps."""

    def __init__(self, kind: str, steps: int = 4):
        if kind == "UNet":
            self.teacher = PrunableUNet2DConditionModel.from_unet(small_stock_unet())
            self.scheduler, self.schedule = scheduler(), schedule_of(scheduler())
        elif kind == "EDM":
            self.teacher = PrunableUNet2DConditionModel.from_unet(small_stock_unet())
            self.schedule = schedule_of(EDMEulerScheduler())
            self.scheduler = stretched(EDMEulerScheduler(), steps, None)
        else:
            self.teacher, pipeline = PRUNABLE[kind].from_unet(STOCK[kind]()), PIPELINES[kind]()
            pipeline.register_modules(transformer=self.teacher, scheduler=eulers(pipeline.scheduler))
            set_resolution(pipeline, 16)
            self.schedule = schedule_for(pipeline)
            self.scheduler = stretched(pipeline.scheduler, steps, self.schedule.steps)
        self.teacher.requires_grad_(False).eval()
        self.denoiser = denoiser_of(self.teacher, self.schedule.prediction_type)
        latents, _, cond = self.denoiser.example(self.teacher, 6, tokens=7, generator=torch.Generator().manual_seed(0))
        self.batch = {"latents": latents, **cond.tensors, "progress": 0.0, "nth": 0}
        self.uncond = cond.rows([0]).map(torch.zeros_like)
        if "text_mask" in cond.tensors:
            whole = torch.ones_like(cond.tensors["text_mask"][:1])
            self.uncond = Conditioning({**self.uncond.tensors, "text_mask": whole})
        self.steps = StepSchedule(self.scheduler, 8, self.scheduler, steps)
        self.student = copy.deepcopy(self.teacher).requires_grad_()

    def objective(self, kind, **options):
        if issubclass(kind, DistributionMatching):
            options = {"initial_student": lambda: self.teacher, **options}
        return kind(self.denoiser, self.schedule, self.uncond, self.teacher, self.steps, **options)

    @property
    def generation(self):
        return Generation.of(self.denoiser, self.schedule, self.steps, self.teacher, 1.0)

    def generated(self):
        cond = Conditioning({k: self.batch[k] for k in self.uncond.tensors})
        return Generated(self.batch["latents"], cond, self.batch["latents"], 3)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def seed_that_stops(generation, step):
    """A seed with which samples stop at this step of the student."""
    steps = len(generation.bounds_N2)
    return next(s for s in count() if torch.randint(steps, (), generator=seeded(s, "stop")) == step)


class Gaussian:
    """Denoisers of normal distributions, x̂ = E[x | z], whose "network" is (mean, standard deviation)."""

    prediction_type = "sample"

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, network, z, t_B, cond, guidance_B=None):
        (mean, std), (alpha_B, sigma_B) = network, self.schedule.alpha_sigma(t_B)
        alpha, sigma = (x_B.view(-1, 1) for x_B in (alpha_B, sigma_B))
        return mean + alpha * std**2 * (z - alpha * mean) / (alpha**2 * std**2 + sigma**2)
