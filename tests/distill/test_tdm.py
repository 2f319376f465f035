"""The laws of trajectory distribution matching."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import LCMScheduler

from slimstep.distill.dmd import FAKE_SCORE, DistributionMatching
from slimstep.distill.generation import Generated
from slimstep.distill.tdm import TrajectoryMatching
from slimstep.distill.teaching import StepSchedule
from slimstep.engine.objective import STUDENT
from slimstep.models.conditioning import Conditioning
from slimstep.models.flow import set_steps
from slimstep.models.noise_schedule import add_noise
from tests.distill.few_steps import Gaussian, World, draw, seed_that_stops


def test_of_a_student_of_one_step_it_is_distribution_matching():
    world, losses = World("UNet", steps=1), {}
    for kind in (DistributionMatching, TrajectoryMatching):
        objective = world.objective(kind)
        networks = {STUDENT: world.student, **objective.networks}
        for parameter in networks[FAKE_SCORE].parameters():
            parameter.data.mul_(1.01)
        losses[kind] = [objective.loss(networks, world.batch, draw(), name)[0] for name in (FAKE_SCORE, STUDENT)]
    torch.testing.assert_close(*losses.values(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stop", [0, 2])
def test_a_step_is_compared_where_the_exported_scheduler_lands(world, stop):
    objective = world.objective(TrajectoryMatching)
    seed = seed_that_stops(objective.generation, stop)
    with torch.no_grad():
        generated = objective.generation(world.teacher, world.batch, world.uncond, draw(seed))
    z, stock = torch.randn(world.batch["latents"].shape, generator=draw(seed)), copy.deepcopy(world.scheduler)
    set_steps(stock, 4, getattr(world.schedule, "steps", None))
    for t in stock.timesteps[: stop + 1]:
        with torch.no_grad():
            pred = world.generation.predict(world.teacher, z, t.expand(len(z)), generated.cond)
        z = stock.step(pred, t, z, return_dict=False)[0]
    torch.testing.assert_close(objective.landed(generated), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stop", [0, 2, 3])
def test_the_times_are_those_of_the_step(world, stop):
    objective, (start, end) = world.objective(TrajectoryMatching), world.generation.bounds_N2[stop]
    generated = replace(world.generated(), step=stop)
    shares = [objective.schedule.share_at(objective.renoised(generated, draw(s)).t_B) for s in range(50)]
    low, high = (float(objective.schedule.share_at(t)) for t in (end, start))
    seen, width = torch.cat(shares), high - low
    assert max(low, 0.02) - 2e-3 <= seen.min() < low + 0.15 * width + 0.02 and high - 0.15 * width - 0.02 < seen.max()
    assert seen.max() <= min(high, 0.98) + 1e-4


@pytest.mark.parametrize("stop", [0, 2, 3])
def test_the_fake_score_rests_at_the_distribution_of_which_the_landings_are(unet, stop, monkeypatch):
    """Of x0 ~ N(2, ½²), noised to where a step lands, it is the denoiser of N(2, ½²): there the loss has no slope."""
    monkeypatch.setattr("slimstep.distill.generation.takes_guidance", lambda network: False)
    objective = unet.objective(TrajectoryMatching)
    objective.generation = replace(objective.generation, denoiser=VelocityGaussian(unet.schedule))
    start = objective.generation.bounds_N2[stop, 0]

    def slopes(mean, std, seed):
        numbers = [torch.tensor(value, requires_grad=True) for value in (mean, std)]
        x0, noise = (torch.randn(20_000, 1, generator=draw(10 * seed + k)) for k in range(2))
        x0 = 2 + 0.5 * x0
        z = add_noise(x0, noise, unet.schedule.alpha_sigma(start.expand(len(x0))))
        generated = Generated(x0, Conditioning(), z, stop)
        noisy = objective.renoised(generated, draw(10 * seed + 2))
        return torch.stack(torch.autograd.grad(objective.denoising(numbers, generated, noisy), numbers))

    def in_errors(mean, std):
        """The slopes over their standard errors."""
        found_R2 = torch.stack([slopes(mean, std, seed) for seed in range(30)])
        return (found_R2.mean(0) / (found_R2.std(0) / 30**0.5)).abs()

    assert in_errors(2.0, 0.5).max() < 4 < in_errors(2.3, 0.7).max()


def test_the_fake_score_hears_of_all_steps_alike(unet, monkeypatch):
    """The first ones land in much noise, of which their targets are full: unweighted they would drown the others."""
    monkeypatch.setattr("slimstep.distill.generation.takes_guidance", lambda network: False)
    objective = unet.objective(TrajectoryMatching)
    objective.generation = replace(objective.generation, denoiser=VelocityGaussian(unet.schedule))
    losses = []
    for stop, (start, _) in enumerate(objective.generation.bounds_N2):
        x0, noise = (torch.randn(20_000, 1, generator=draw(k)) for k in range(2))
        z = add_noise(x0, noise, unet.schedule.alpha_sigma(start.expand(len(x0))))
        generated = Generated(x0, Conditioning(), z, stop)
        exact = torch.tensor(0.0), torch.tensor(1.0)
        losses.append(objective.denoising(exact, generated, objective.renoised(generated, draw(2))).item())
    assert max(losses) < 3 * losses[-1] and max(losses) < 1.5


class VelocityGaussian(Gaussian):
    """The same, which predicts v."""

    prediction_type = "v_prediction"

    def __call__(self, network, z, t_B, cond, guidance_B=None):
        x0 = super().__call__(network, z, t_B, cond)
        alpha, sigma = (x_B.view(-1, 1) for x_B in self.schedule.alpha_sigma(t_B))
        return alpha * (z - alpha * x0) / sigma - sigma * x0


def test_where_a_sampler_adds_new_noise_a_step_lands_on_what_it_sees(unet):
    kind = LCMScheduler.from_config(unet.scheduler.config, original_inference_steps=2)
    unet = copy.copy(unet)
    unet.steps = StepSchedule(unet.scheduler, 8, kind, 2)
    objective, generated = unet.objective(TrajectoryMatching), unet.generated()
    alpha_B, sigma_B = objective.landing(generated)
    assert torch.equal(objective.landed(generated), generated.x0)
    assert (alpha_B == 1).all() and (sigma_B == 0).all()


def test_a_discriminator_is_refused_for_a_step_lands_on_no_image(unet):
    with pytest.raises(ValueError, match=r"adversarial_weight=0.1: .*no image; set 0, or take objective=dmd"):
        unet.objective(TrajectoryMatching, adversarial_weight=0.1)
