"""The laws of continuous-time consistency."""

import copy
from dataclasses import replace

import pytest
import torch

from slimstep.distill.generation import Noisy
from slimstep.distill.scm import ContinuousConsistency, along, cos_sin, size
from slimstep.models.conditioning import Conditioning
from slimstep.models.noise_schedule import pred_of
from tests.distill.few_steps import Gaussian, World, draw


class Exact(Gaussian):
    """Of a normal distribution around 0: the teacher gives E[x | z], the student where the ODE from z ends."""

    def __call__(self, network, z, t_B, cond, guidance_B=None):
        level = self.schedule.alpha_sigma(t_B)
        if network == "teacher":
            x0 = super().__call__((0.0, 0.5), z, t_B, cond)
        else:
            cos, sin = (x_B.view(-1, 1) for x_B in cos_sin(level))
            x0 = z / size(level)[:, None] * 0.5 / (0.25 * cos**2 + sin**2).sqrt()
        return pred_of(x0, z, level, self.schedule.prediction_type)


@pytest.mark.parametrize("kind", ["UNet", "SD3", "EDM"])
def test_the_solution_of_the_ode_is_where_continuous_consistency_rests(kind, monkeypatch):
    monkeypatch.setattr("slimstep.distill.generation.takes_guidance", lambda network: False)
    world = World(kind)
    objective = world.objective(ContinuousConsistency, guidance_scale=1.0, start_share=0.0, time_range=(0.1, 0.9))
    schedule, objective.teacher = world.schedule, "teacher"
    objective.generation = replace(objective.generation, denoiser=Exact(schedule))
    objective.uncond = Conditioning()
    t_B, before_B = objective.times(512, draw())
    z, level = torch.randn(512, 1, generator=draw(1)), schedule.alpha_sigma(t_B)
    noisy = Noisy(z, z, t_B, level, Conditioning())
    F, path = (objective.velocity(network, noisy) for network in ("student", "teacher"))
    slope = objective.difference("student", noisy, F, path, before_B)
    cos, sin = (x_B[:, None] for x_B in cos_sin(level))
    g = -(cos**2) * (F - path) - cos * sin * (along(noisy) + slope)
    assert (F - path).abs().mean() > 0.1  # the teacher's single step is elsewhere
    assert g.abs().mean() < 0.02
    moved = objective.direction(F, path, slope, noisy, progress=0.0)
    assert moved.abs().mean() > 0.1 and moved.square().mean(1).max() <= 1  # without the tangent: the teacher's step


def test_a_difference_over_a_short_time_is_the_jvp():
    """In float64, and at times that are no whole timesteps: what a network makes of a time turns within few of them."""
    world = World("SD3")
    objective = world.objective(ContinuousConsistency, step=1e-6, start_share=0.0, time_range=(0.3, 0.9))
    teacher, latents = copy.deepcopy(world.teacher).double(), world.batch["latents"].double()
    t_B, before_B = (t_B.double() for t_B in objective.times(6, draw()))
    before_B = t_B - (t_B - before_B).clamp(min=1e-2)
    cond, uncond = (c.to(dtype=torch.float64) for c in (world.generated().cond, world.uncond))
    noisy = Noisy(latents, latents, t_B, world.schedule.alpha_sigma(t_B), cond)
    with torch.no_grad():
        F, path = objective.velocity(teacher, noisy), objective.velocity(teacher, noisy, uncond)
        short, exact = (way(teacher, noisy, F, path, before_B) for way in (objective.difference, objective.jvp))
    assert (short - exact).square().mean() < 1e-3 * exact.square().mean()


@pytest.mark.parametrize("tangent", ["difference", "jvp"])
def test_a_consistent_student_is_trained_where_its_steps_start(unet, tangent):
    objective = unet.objective(ContinuousConsistency, tangent=tangent, tangent_warmup=0.0, start_share=1.0)
    t_B, before_B = objective.times(64, draw())
    assert set(t_B.tolist()) == set(unet.schedule.grid(unet.scheduler, 4)[:, 0].tolist())
    assert (before_B < t_B).all() and (before_B >= 0).all()
    loss, _ = objective(unet.student, unet.batch, draw())
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in unet.student.parameters())
    unet.student.zero_grad(set_to_none=True)
