"""The noise schedule's laws, for the three things a network can predict."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from slimstep.models.noise_schedule import (
    PREDICTION_TYPES,
    RectifiedFlow,
    VariancePreserving,
    add_noise,
    ddim_step,
    eps_of,
    nested_steps,
    pred_of,
    schedule_of,
    snr,
    target_of,
    x0_between,
    x0_of,
)

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
    schedule = schedule_of(scheduler(prediction_type, zero_snr))
    x0, noise = draws
    level = schedule.alpha_sigma(T_B)
    z, target = add_noise(x0, noise, level), target_of(x0, noise, level, prediction_type)
    # At t = 0 the noise is σ = 0.03 of z, at t = 998 the image is α ≥ 0.0005 of it: so much precision is lost.
    torch.testing.assert_close(x0_of(target, z, level, prediction_type), x0, rtol=0, atol=2e-3)
    torch.testing.assert_close(eps_of(target, z, level, prediction_type), noise, rtol=0, atol=2e-3)


def test_noising_and_velocity_are_diffusers(draws):
    x0, noise = draws
    reference = scheduler("v_prediction", zero_snr=True)
    level = schedule_of(reference).alpha_sigma(T_B)
    torch.testing.assert_close(add_noise(x0, noise, level), reference.add_noise(x0, noise, T_B))
    velocity = target_of(x0, noise, level, "v_prediction")
    torch.testing.assert_close(velocity, reference.get_velocity(x0, noise, T_B))


def test_variance_is_preserved_and_snr_falls():
    schedule = schedule_of(scheduler())
    torch.testing.assert_close(schedule.alpha_T**2 + schedule.sigma_T**2, torch.ones(len(schedule)))
    assert snr(schedule.alpha_sigma(torch.arange(1000))).diff().max() < 0
    assert schedule_of(scheduler(), "meta").alpha_T.is_meta and len(schedule) == 1000


def test_at_zero_snr_all_is_noise_and_v_is_minus_the_image(draws):
    schedule = schedule_of(scheduler("v_prediction", zero_snr=True))
    x0, noise = draws
    last = schedule.alpha_sigma(torch.full((len(x0),), 999))
    assert (snr(last) == 0).all()
    assert torch.equal(add_noise(x0, noise, last), noise)
    assert torch.equal(target_of(x0, noise, last, "v_prediction"), -x0)
    assert torch.equal(x0_of(-x0, noise, last, "v_prediction"), x0)


def test_an_unknown_prediction_type_is_named():
    with pytest.raises(ValueError, match="prediction_type 'flow' is unknown; choose from"):
        VariancePreserving(torch.ones(2), torch.zeros(2), "flow")


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [32, 8, 1])
def test_a_step_is_diffusers_ddim_step(draws, prediction_type, steps):
    reference = scheduler(prediction_type, timestep_spacing="trailing", set_alpha_to_one=True)
    schedule = schedule_of(reference)
    reference.set_timesteps(steps)
    z, pred = (draw[:1] for draw in draws)
    for t, s in schedule.grid(reference, steps):
        start, end = schedule.alpha_sigma(t[None]), schedule.alpha_sigma(s[None])
        expected = reference.step(pred, t, z).prev_sample
        torch.testing.assert_close(ddim_step(pred, z, start, end, prediction_type), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_one_step_with_the_target_lands_where_the_way_there_ended(draws, prediction_type, zero_snr):
    schedule = schedule_of(scheduler("v_prediction", zero_snr, set_alpha_to_one=True))
    z, z_s = draws
    t_B, s_B = torch.tensor([999, 999, 500, 124, 30]), torch.tensor([874, -1, 250, -1, -1])
    start, end = schedule.alpha_sigma(t_B), schedule.alpha_sigma(s_B)
    x0 = x0_between(z, start, z_s, end)
    assert x0.isfinite().all()
    if prediction_type == "epsilon" and zero_snr:
        return  # at zero SNR ε says nothing of the image
    landed = ddim_step(pred_of(x0, z, start, prediction_type), z, start, end, prediction_type)
    torch.testing.assert_close(landed, z_s, rtol=1e-3, atol=2e-3)


def test_trailing_grids_nest_down_to_one_step_and_end_in_clean_latents():
    trailing = scheduler(timestep_spacing="trailing")
    schedule = schedule_of(trailing)
    for student, teacher in [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2), (8, 32)]:
        bounds = nested_steps(schedule, trailing, student, trailing, teacher)
        assert bounds.shape == (student, teacher // student + 1)
        assert bounds[0, 0] == 999 and bounds[-1, -1] == -1
        assert (bounds.diff(dim=1) < 0).all()
        assert ((bounds[:-1, -1] - bounds[1:, 0]).abs() <= 1).all()  # diffusers lands at most one timestep off


@pytest.mark.parametrize(("student", "teacher", "spacing"), [(16, 32, "leading"), (16, 40, "trailing")])
def test_grids_that_do_not_nest_are_refused(student, teacher, spacing):
    one = scheduler(timestep_spacing=spacing)
    with pytest.raises(ValueError, match=f"{student} steps do not nest in a teacher's {teacher}.*trailing"):
        nested_steps(schedule_of(one), one, student, one, teacher)


def test_eulers_steps_are_ddims_where_both_divide():
    """Euler lands where the next step starts; with v-prediction and zero SNR both walk the same way."""
    ddim = scheduler("v_prediction", zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=True)
    euler = EulerDiscreteScheduler.from_config(ddim.config)
    schedule = schedule_of(ddim)
    assert torch.equal(schedule.grid(ddim, 8), schedule.grid(euler, 8))
    starts, ends = schedule.grid(euler, 32).T
    assert torch.equal(starts[1:], ends[:-1]) and ends[-1] == -1


@pytest.mark.parametrize("shape", [(4,), (4, 8, 8), (4, 3, 8, 8)])
def test_on_a_rectified_flow_ddims_step_is_eulers_step(shape):
    """With α = 1 − t and σ = t: z + (s − t)·u. Samples may have any number of axes, and times be continuous."""
    draw, flow = torch.Generator().manual_seed(0), RectifiedFlow()
    z, u, z_s = (torch.randn(5, *shape, generator=draw) for _ in range(3))
    t_B = flow.sample_times(5, draw)
    s_B = t_B * flow.sample_times(5, draw)
    assert 0 < t_B.min() < t_B.max() < 1
    start, end = flow.alpha_sigma(t_B), flow.alpha_sigma(s_B)
    euler = z + (s_B - t_B).view(-1, *[1] * len(shape)) * u
    torch.testing.assert_close(ddim_step(u, z, start, end, "flow"), euler)
    x0, noise = x0_of(u, z, start, "flow"), eps_of(u, z, start, "flow")
    torch.testing.assert_close(add_noise(x0, noise, start), z)
    torch.testing.assert_close(target_of(x0, noise, start, "flow"), u)
    one = pred_of(x0_between(z, start, z_s, end), z, start, "flow")
    torch.testing.assert_close(ddim_step(one, z, start, end, "flow"), z_s, rtol=1e-3, atol=1e-3)


def test_a_step_of_the_flow_is_diffusers_flow_matching_step(draws):
    reference, flow = FlowMatchEulerDiscreteScheduler(shift=3.0), RectifiedFlow()
    reference.set_timesteps(4)
    z, u = (draw[:1] for draw in draws)
    bounds = flow.grid(reference, 4)
    assert bounds[0, 0] == 1 and bounds[-1, 1] == 0
    for t, (start, end) in zip(reference.timesteps, bounds[:, :, None], strict=True):
        expected = reference.step(u, t, z).prev_sample
        step = ddim_step(u, z, flow.alpha_sigma(start), flow.alpha_sigma(end), "flow")
        torch.testing.assert_close(step, expected)
