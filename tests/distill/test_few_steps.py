"""What all objectives of few steps share: samples of the exported sampler, and a cost that plans count."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import LCMScheduler
from torch import nn

from slimstep.distill.adversarial import AdversarialDistillation
from slimstep.distill.dmd import DistributionMatching
from slimstep.distill.generation import Generation
from slimstep.distill.scm import ContinuousConsistency
from slimstep.distill.tdm import TrajectoryMatching
from slimstep.distill.teaching import StepSchedule
from slimstep.engine.objective import STUDENT, as_objective
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import takes_guidance
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.flow import set_steps
from slimstep.models.guidance import with_fixed_guidance, with_guidance_embedding
from tests.distill.few_steps import World, draw, seed_that_stops
from tests.tiny import DENOISER, WIDTH, small_unet


def test_samples_are_those_of_the_scheduler_that_the_student_is_exported_with(world):
    seed = seed_that_stops(world.generation, 3)
    with torch.no_grad():
        ours = world.generation(world.teacher, world.batch, world.uncond, draw(seed))
    z = torch.randn(world.batch["latents"].shape, generator=draw(seed))
    stock = copy.deepcopy(world.scheduler)
    set_steps(stock, 4, getattr(world.schedule, "steps", None))
    for t in stock.timesteps:
        with torch.no_grad():
            pred = world.generation.predict(world.teacher, z, t.expand(len(z)), ours.cond)
        z = stock.step(pred, t, z, return_dict=False)[0]
    torch.testing.assert_close(ours.x0, z, rtol=1e-4, atol=1e-4)


def test_a_student_of_lcms_scheduler_is_trained_where_that_takes_it(unet):
    """Its grid is that of the student's steps, and the noise between them is new: two steps with the same draws."""
    kind = LCMScheduler.from_config(unet.scheduler.config, original_inference_steps=2)
    steps = StepSchedule(unet.scheduler, 8, kind, 2)
    generation = Generation.of(unet.denoiser, unet.schedule, steps, unet.teacher, 1.0)
    seed = seed_that_stops(generation, 1)
    with torch.no_grad():
        ours = generation(unet.teacher, unet.batch, unet.uncond, draw(seed))
    generator = draw(seed)
    z = torch.randn(unet.batch["latents"].shape, generator=generator)
    kind.set_timesteps(2)
    assert kind.timesteps.tolist() == [999, 499] == generation.bounds_N2[:, 0].tolist()
    for t in kind.timesteps:
        with torch.no_grad():
            pred = generation.predict(unet.teacher, z, t.expand(len(z)), ours.cond)
        z = kind.step(pred, t, z, generator=generator, return_dict=False)[0]
    torch.testing.assert_close(ours.x0, z, rtol=1e-4, atol=1e-4)  # LCM's boundary condition is 1e-8 from x̂ here


@pytest.mark.parametrize("w", [1.0, 2.5, 7.0])
def test_a_fixed_guidance_scale_is_the_scale_given_as_an_input(w):
    torch.manual_seed(0)
    embedded = with_guidance_embedding(PrunableUNet2DConditionModel.from_unet(small_unet()), 32)
    nn.init.normal_(embedded.time_embedding.cond_proj.weight)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([700.0, 20.0])
    cond = Conditioning({"text": torch.randn(2, 5, WIDTH)})
    with torch.no_grad():
        expected = DENOISER(embedded, x, t, cond, guidance_B=torch.full((2,), w))
        fixed = with_fixed_guidance(embedded, w)
        assert not takes_guidance(fixed) and takes_guidance(embedded)
        torch.testing.assert_close(DENOISER(fixed, x, t, cond), expected, rtol=1e-4, atol=1e-5)


def test_all_steps_of_the_student_are_trained_equally_often(unet):
    times = [unet.schedule.grid(unet.scheduler, 4)[:, 0].tolist().index(t) for t in stops(unet, 200)]
    assert set(times) == {0, 1, 2, 3} and min(times.count(k) for k in range(4)) > 30


def stops(world, draws):
    """The time of the last evaluation of each of so many samples."""
    seen = []

    class Watching:
        prediction_type = "v_prediction"

        def __call__(self, network, z, t_B, cond, guidance_B=None):
            seen.append(int(t_B[0]))
            return z

    generation, ends = replace(world.generation, denoiser=Watching()), []
    for seed in range(draws):
        generation(world.teacher, world.batch, world.uncond, draw(seed))
        ends.append(seen[-1])
    return ends


@pytest.mark.parametrize("range_", [(0.0, 0.5), (0.6, 0.5), (0.5, 1.0)])
def test_times_where_nothing_can_be_compared_are_refused(unet, range_):
    for kind in (DistributionMatching, AdversarialDistillation):
        with pytest.raises(ValueError, match="objective.time_range=.* two shares, 0 < low < high < 1"):
            unet.objective(kind, time_range=range_)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DistributionMatching, {}),
        (DistributionMatching, {"fresh_samples": True, "fake_updates": 2}),
        (DistributionMatching, {"adversarial_weight": 0.1, "teacher_mix": 0.5}),
        (TrajectoryMatching, {}),
        (AdversarialDistillation, {}),
        (AdversarialDistillation, {"distillation_weight": 0.0, "discriminator_updates": 2}),
        (ContinuousConsistency, {}),
    ],
)
def test_the_cost_that_is_planned_is_the_rows_that_are_run(unet, kind, options):
    """In the mean over the stops of a student of one step, which has one; guided rows count once."""
    world = World("UNet", steps=1)
    objective, rows = world.objective(kind, guidance_scale=1.0, **options), {True: 0, False: 0}

    class Counting:
        prediction_type, sample_shape = "v_prediction", (4, 8, 8)
        example = world.denoiser.example

        def __call__(self, network, x, *args, **kwargs):
            rows[torch.is_grad_enabled()] += len(x)
            return world.denoiser(network, x, *args, **kwargs)

    objective.generation = replace(objective.generation, denoiser=Counting())
    if hasattr(objective, "adversarial"):
        objective.adversarial = replace(objective.adversarial, generation=objective.generation)
    objective = as_objective(objective)
    networks = {STUDENT: world.student, **objective.networks}
    rows.update({True: 0, False: 0})
    for nth, update in enumerate(objective.updates(0)):
        for name, network in networks.items():
            network.requires_grad_(name == update)
        objective.loss(networks, {**world.batch, "nth": nth}, draw(nth), update)
    cost = getattr(objective, "cost", None) or objective.call.cost
    assert rows == {True: 6 * cost.trained_rows, False: 6 * cost.rows}


def test_a_network_beside_the_student_is_in_the_plan(unet):
    weights = sum(p.numel() for p in unet.teacher.parameters())
    assert unet.objective(DistributionMatching).cost.beside == weights
    assert unet.objective(DistributionMatching, fake_lora_rank=4).cost.beside == 0
    assert unet.objective(AdversarialDistillation).cost.beside == 0
