"""The noise schedule's laws, for the three things a network can predict."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from slimstep.models.noise_schedule import PREDICTION_TYPES, NoiseSchedule, nested_steps, sampler_steps

T_B = torch.tensor([0, 1, 250, 500, 998])


def scheduler(prediction_type="epsilon", zero_snr=False, **options):
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr, **options,
    )  # fmt: skip


@pytest.fixture
def draws():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(len(T_B), 4, 8, 8, generator=draw) for _ in range(2)]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_target_gives_clean_latents_and_noise_back(draws, prediction_type, zero_snr):
    schedule = NoiseSchedule.from_scheduler(scheduler(prediction_type, zero_snr))
    x0, noise = draws
    z, target = schedule.noisy(x0, noise, T_B), schedule.target(x0, noise, T_B)
    # At t = 0 the noise is σ = 0.03 of z, at t = 998 the image is α ≥ 0.0005 of it: so much precision is lost.
    torch.testing.assert_close(schedule.x0(target, z, T_B), x0, rtol=0, atol=2e-3)
    torch.testing.assert_close(schedule.eps(target, z, T_B), noise, rtol=0, atol=2e-3)


def test_noising_and_velocity_are_diffusers(draws):
    x0, noise = draws
    reference = scheduler("v_prediction", zero_snr=True)
    schedule = NoiseSchedule.from_scheduler(reference)
    torch.testing.assert_close(schedule.noisy(x0, noise, T_B), reference.add_noise(x0, noise, T_B))
    torch.testing.assert_close(schedule.target(x0, noise, T_B), reference.get_velocity(x0, noise, T_B))


def test_variance_is_preserved_and_snr_falls():
    schedule = NoiseSchedule.from_scheduler(scheduler())
    torch.testing.assert_close(schedule.alpha_T**2 + schedule.sigma_T**2, torch.ones(len(schedule)))
    assert schedule.snr(torch.arange(1000)).diff().max() < 0
    assert schedule.to("meta").alpha_T.is_meta and len(schedule.to("meta")) == 1000


def test_at_zero_snr_all_is_noise_and_v_is_minus_the_image(draws):
    schedule = NoiseSchedule.from_scheduler(scheduler("v_prediction", zero_snr=True))
    x0, noise = draws
    last = torch.full((len(x0),), 999)
    assert (schedule.snr(last) == 0).all()
    assert torch.equal(schedule.noisy(x0, noise, last), noise)
    assert torch.equal(schedule.target(x0, noise, last), -x0)
    assert torch.equal(schedule.x0(-x0, noise, last), x0)


def test_an_unknown_prediction_type_is_named():
    with pytest.raises(ValueError, match="prediction_type 'flow' is unknown; choose from"):
        NoiseSchedule(torch.ones(2), torch.zeros(2), "flow")


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [32, 8, 1])
def test_a_step_is_diffusers_ddim_step(draws, prediction_type, steps):
    reference = scheduler(prediction_type, timestep_spacing="trailing", set_alpha_to_one=True)
    schedule, (starts, ends) = NoiseSchedule.from_scheduler(reference), sampler_steps(reference, steps)
    reference.set_timesteps(steps)
    z, pred = (draw[:1] for draw in draws)
    for t, s in zip(starts, ends, strict=True):
        expected = reference.step(pred, t, z).prev_sample
        torch.testing.assert_close(schedule.ddim(pred, z, t[None], s[None]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_one_step_with_the_target_lands_where_the_way_there_ended(draws, prediction_type, zero_snr):
    schedule = NoiseSchedule.from_scheduler(scheduler("v_prediction", zero_snr, set_alpha_to_one=True))
    z, z_s = draws
    t_B, s_B = torch.tensor([999, 999, 500, 124, 30]), torch.tensor([874, -1, 250, -1, -1])
    x0 = schedule.x0_between(z, t_B, z_s, s_B)
    assert x0.isfinite().all()
    if prediction_type == "epsilon" and zero_snr:
        return  # at zero SNR ε says nothing of the image
    own = NoiseSchedule(schedule.alpha_T, schedule.sigma_T, prediction_type)
    torch.testing.assert_close(own.ddim(own.pred(x0, z, t_B), z, t_B, s_B), z_s, rtol=1e-3, atol=2e-3)


def test_trailing_grids_nest_down_to_one_step_and_end_in_clean_latents():
    trailing = scheduler(timestep_spacing="trailing")
    for student, teacher in [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2), (8, 32)]:
        bounds = nested_steps(trailing, student, trailing, teacher)
        assert bounds.shape == (student, teacher // student + 1)
        assert bounds[0, 0] == 999 and bounds[-1, -1] == -1
        assert (bounds.diff(dim=1) < 0).all()
        assert ((bounds[:-1, -1] - bounds[1:, 0]).abs() <= 1).all()  # diffusers lands at most one timestep off


@pytest.mark.parametrize(("student", "teacher", "spacing"), [(16, 32, "leading"), (16, 40, "trailing")])
def test_grids_that_do_not_nest_are_refused(student, teacher, spacing):
    one = scheduler(timestep_spacing=spacing)
    with pytest.raises(ValueError, match=f"{student} steps do not nest in a teacher's {teacher}.*trailing"):
        nested_steps(one, student, one, teacher)


def test_eulers_steps_are_ddims_where_both_divide():
    """Euler lands where the next step starts; with v-prediction and zero SNR both walk the same way."""
    ddim = scheduler("v_prediction", zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=True)
    euler = EulerDiscreteScheduler.from_config(ddim.config)
    for ours, theirs in zip(sampler_steps(ddim, 8), sampler_steps(euler, 8), strict=True):
        assert torch.equal(ours, theirs)
    starts, ends = sampler_steps(euler, 32)
    assert torch.equal(starts[1:], ends[:-1]) and ends[-1] == -1
