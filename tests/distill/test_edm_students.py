"""Students of an EDM teacher (Playground v2.5): every objective of few steps, and the grid of their own scheduler."""

import copy

import pytest
import torch

from slimstep.distill.adversarial import AdversarialDistillation
from slimstep.distill.dmd import DistributionMatching
from slimstep.distill.recovery import Recovery
from slimstep.distill.scm import ContinuousConsistency
from slimstep.distill.steps import StepDistillation
from slimstep.distill.tdm import TrajectoryMatching
from slimstep.distill.teaching import draw_steps, teacher_target
from slimstep.engine.objective import STUDENT, as_objective
from slimstep.models.noise_schedule import each
from tests.distill.few_steps import World, draw, seed_that_stops


@pytest.fixture(scope="module")
def edm():
    return World("EDM")


@pytest.mark.parametrize(
    "kind", [StepDistillation, DistributionMatching, TrajectoryMatching, AdversarialDistillation, ContinuousConsistency]
)
def test_every_objective_gives_its_student_a_finite_gradient(edm, kind):
    objective = as_objective(edm.objective(kind))
    networks = {STUDENT: edm.student, **objective.networks}
    for update in objective.updates(0):
        loss, _ = objective.loss(networks, edm.batch, draw(), update)
        trained = [p for p in networks[update].parameters() if p.requires_grad]
        gradients = [g for g in torch.autograd.grad(loss, trained, allow_unused=True) if g is not None]
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
        assert any(g.abs().sum() > 0 for g in gradients)


def test_recovery_of_a_network_that_is_its_teacher_is_the_denoising_loss_alone(edm):
    objective = Recovery(edm.denoiser, edm.schedule, edm.uncond, edm.teacher)
    loss, metrics = objective(edm.student, edm.batch, draw())
    assert metrics["output"] == 0 and metrics["features"] == 0
    assert loss.isfinite() and loss == metrics["denoising"] > 0


def test_samples_are_those_of_the_scheduler_that_the_student_is_exported_with(edm):
    seed = seed_that_stops(edm.generation, 3)
    with torch.no_grad():
        ours = edm.generation(edm.teacher, edm.batch, edm.uncond, draw(seed))
    stock = copy.deepcopy(edm.scheduler)
    stock.set_timesteps(4)
    x = torch.randn(edm.batch["latents"].shape, generator=draw(seed)) * stock.init_noise_sigma
    for t in stock.timesteps:
        with torch.no_grad():
            pred = edm.generation.predict(edm.teacher, stock.scale_model_input(x, t), t.expand(len(x)), ours.cond)
        x = stock.step(pred, t, x, return_dict=False)[0]
    # EDM begins with σ_max and the variance of a sample of deviation 1, whatever σ_d: 1 + 6e-5 of unit noise.
    torch.testing.assert_close(ours.x0, x, rtol=1e-3, atol=2e-3)


def test_a_teachers_steps_land_where_its_student_has_to(edm):
    """The target is of the size of samples, for σ_d is in it."""
    bounds = edm.steps.bounds(edm.schedule)
    cond = edm.generated().cond
    drawn = draw_steps(edm.batch, edm.schedule, bounds, cond, draw())
    target = teacher_target(edm.denoiser, edm.teacher, edm.schedule, drawn, edm.uncond, torch.zeros(0))
    assert target.x0_BCHW.isfinite().all() and target.gap_B.isfinite().all()
    alpha_B, sigma_B = edm.schedule.alpha_sigma(drawn.t_B)
    noisy = each(alpha_B, drawn.z_BCHW) * drawn.x0_BCHW + each(sigma_B, drawn.z_BCHW) * drawn.noise_BCHW
    torch.testing.assert_close(drawn.z_BCHW, noisy)
