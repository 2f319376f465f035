"""Flow matching's laws: steps as diffusers' pipelines make them, training times, and a teacher within its student's."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift, retrieve_timesteps

from slimstep.models.flow import (
    FlowSteps,
    check_flow,
    eulers,
    is_flow,
    prediction_type_of,
    resolution_shift,
    shift_of,
    shifted,
    stretched,
    unshifted,
)
from slimstep.models.noise_schedule import (
    LEAST_SIGMA,
    add_noise,
    ddim_step,
    eps_of,
    nested_steps,
    pred_of,
    schedule_of,
    target_of,
    x0_between,
    x0_of,
)
from slimstep.models.schedulers import check_sampling


def scheduler(**fields) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**fields)


BY_RESOLUTION = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
KINDS = {
    "no shift": ({}, FlowSteps()),
    "Stable Diffusion 3": ({"shift": 3.0}, FlowSteps()),
    "Stable Diffusion 3.5 medium, by resolution": (BY_RESOLUTION, FlowSteps(tokens=1024)),
    "FLUX dev": (BY_RESOLUTION, FlowSteps(tokens=4096, own_sigmas=True)),
    "FLUX schnell": ({"shift": 1.0}, FlowSteps(tokens=4096, own_sigmas=True)),
    "Qwen-Image": ({**BY_RESOLUTION, "shift_terminal": 0.02}, FlowSteps(tokens=4096, own_sigmas=True)),
    "a linear shift": ({**BY_RESOLUTION, "time_shift_type": "linear"}, FlowSteps(tokens=600)),
}  # fmt: skip


@pytest.mark.parametrize("steps", [2, 4, 28])
@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_is_the_stock_pipelines(kind, steps):
    fields, flow = KINDS[kind]
    stock, own = scheduler(**fields), {"sigmas": np.linspace(1.0, 1 / steps, steps)} if flow.own_sigmas else {}
    if fields.get("use_dynamic_shifting"):
        own["mu"] = calculate_shift(flow.tokens, 256, 4096, fields["base_shift"], fields["max_shift"])
    retrieve_timesteps(stock, steps, "cpu", **own)
    schedule = schedule_of(scheduler(**fields), flow=flow)
    starts, ends = schedule.grid(scheduler(**fields), steps).T
    assert torch.equal(starts, stock.timesteps) and torch.equal(starts[1:], ends[:-1]) and ends[-1] == 0
    torch.testing.assert_close(schedule.alpha_sigma(starts)[1], stock.sigmas[:-1], rtol=1e-6, atol=0)
    check_sampling(scheduler(**fields), steps, flow)


SOLVERS = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)


@pytest.mark.parametrize("kind", SOLVERS)
def test_solvers_that_take_a_flows_sigmas_have_its_schedule(kind):
    solver = kind(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    schedule = schedule_of(solver)
    assert schedule.shift == 3.0 and schedule.prediction_type == "flow" == prediction_type_of(solver)
    starts, ends = schedule.grid(solver, 4).T
    solver.set_timesteps(4)
    assert torch.equal(starts.long(), solver.timesteps) and torch.equal(starts[1:], ends[:-1]) and ends[-1] == 0
    check_sampling(solver, 4, FlowSteps())
    euler = eulers(solver)
    assert type(euler) is FlowMatchEulerDiscreteScheduler and schedule_of(euler).shift == 3.0
    assert eulers(euler) is euler and not is_flow(kind(use_flow_sigmas=True, prediction_type="epsilon"))


def test_a_solver_whose_shift_is_by_resolution_is_refused_by_name():
    fields = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler has use_dynamic_shifting=True, which only"):
        schedule_of(DPMSolverMultistepScheduler(**fields))


def test_the_grid_of_stable_diffusion_3_ends_with_a_step_of_nearly_nothing():
    starts, _ = schedule_of(scheduler(shift=3.0)).grid(scheduler(shift=3.0), 4).T
    torch.testing.assert_close(starts, torch.tensor([1000, 857.69, 602.15, 8.93]), rtol=0, atol=0.01)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5, 12.0])
def test_unshifted_is_the_inverse_of_shifted(shift):
    u = torch.linspace(0, 1, 11)
    assert shifted(u, shift)[0] == 0 and shifted(u, shift)[-1] == 1
    torch.testing.assert_close(unshifted(shifted(u, shift), shift), u)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_training_times_are_logit_normal_before_their_shift(shift):
    """The median of a logit-normal time is 1/2, and 68 % of all lie within one deviation."""
    schedule = schedule_of(scheduler(shift=shift))
    t = schedule.sample_times(4000, torch.Generator().manual_seed(0)) / 1000
    assert t.min() > 0 and t.max() < 1
    logit = torch.logit(unshifted(t, shift))
    assert abs(logit.mean()) < 0.05 and abs(logit.std() - 1) < 0.05
    assert schedule.sample_times(2, torch.Generator().manual_seed(0)).max() < 1000


@pytest.fixture
def draws():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(4, 16, 4, 4, generator=draw) for _ in range(3)]


def test_sample_noise_and_flow_say_the_same(draws):
    x0, noise, _ = draws
    level = schedule_of(scheduler()).alpha_sigma(torch.tensor([1.0, 250, 750, 1000]))
    z, u = add_noise(x0, noise, level), target_of(x0, noise, level, "flow")
    torch.testing.assert_close(u, noise - x0)
    torch.testing.assert_close(x0_of(u, z, level, "flow"), x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(eps_of(u, z, level, "flow"), noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pred_of(x0, z, level, "flow"), u, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_ddim_step_is_the_stock_schedulers_step(kind, draws):
    fields, flow = KINDS[kind]
    stock, schedule = scheduler(**fields), schedule_of(scheduler(**fields), flow=flow)
    stock.set_timesteps(4, **flow.options(stock, 4))
    z, u, _ = draws
    for t, (start, end) in zip(stock.timesteps, schedule.grid(scheduler(**fields), 4)[:, :, None], strict=True):
        ours = ddim_step(u, z, schedule.alpha_sigma(start), schedule.alpha_sigma(end), "flow")
        torch.testing.assert_close(ours, stock.step(u, t, z).prev_sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("student", "teacher"), [(4, 8), (8, 32), (2, 2)])
def test_a_teacher_steps_within_its_students_steps(kind, student, teacher):
    fields, flow = KINDS[kind]
    stock, schedule = scheduler(**fields), schedule_of(scheduler(**fields), flow=flow)
    bounds = nested_steps(schedule, stock, student, stock, teacher)
    grid = schedule.grid(stock, student)
    assert bounds.shape[1] == teacher // student + 1 and (bounds.diff(dim=1) < 0).all()
    assert torch.equal(bounds[:, [0, -1]], grid[: len(bounds)])
    left_out = grid[len(bounds) :, 0]
    assert len(left_out) <= 1 and (left_out < 1000 * LEAST_SIGMA).all()
    ends_with_nothing = not flow.own_sigmas or "shift_terminal" in fields
    assert bool(len(left_out)) == ends_with_nothing


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_of_a_student_removes_noise(kind, steps, tmp_path):
    """Its last one starts where the last of so many equal steps would, in the scheduler that its folder has."""
    fields, flow = KINDS[kind]
    stock = scheduler(**fields)
    schedule, students = schedule_of(stock, flow=flow), stretched(stock, steps, flow)
    students.save_pretrained(tmp_path)
    grid = schedule.grid(FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path), steps)
    assert torch.equal(nested_steps(schedule, students, steps, stock, 4 * steps)[:, [0, -1]], grid)
    last = shifted(torch.tensor(1 / steps), shift_of(stock, flow))
    assert grid[-1, 0] / 1000 == pytest.approx(last.item(), rel=1e-4) and grid[0, 0] == 1000
    wasted = schedule.grid(stock, steps)[-1, 0] < LEAST_SIGMA * 1000
    assert (students is stock) == kind.startswith("FLUX") and wasted != kind.startswith("FLUX")


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_is_never_stretched(kind):
    """diffusers would make 0 / 0 of it."""
    fields, flow = KINDS[kind]
    stock = scheduler(**fields)
    assert schedule_of(stock, flow=flow).grid(stretched(stock, 1, flow), 1).tolist() == [[1000, 0]]
    if not kind.startswith("FLUX"):
        with pytest.raises(ValueError, match="cannot make 1 steps with shift_terminal=0"):
            check_sampling(stretched(stock, 2, flow), 1, flow)


def test_without_a_shift_the_teachers_steps_are_equally_long():
    stock = scheduler()
    bounds = nested_steps(schedule_of(stock), stock, 4, stock, 16)
    lengths = bounds.diff(dim=1)
    torch.testing.assert_close(lengths, lengths[:, :1].expand_as(lengths))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_student_step_lands_where_the_teachers_two_land(shift, draws):
    """The teacher: any function of z and t."""
    stock = scheduler(shift=shift)
    schedule = schedule_of(stock)
    x0, noise, direction = draws
    bounds = nested_steps(schedule, stock, 4, stock, 8)
    for times in bounds[:, :, None]:
        levels = [schedule.alpha_sigma(t) for t in times]
        start = z = add_noise(x0, noise, levels[0])
        for t, here, there in zip(times, levels[:-1], levels[1:], strict=False):
            z = ddim_step(torch.sin(z) + t / 1000 * direction, z, here, there, "flow")
        one = pred_of(x0_between(start, levels[0], z, levels[-1]), start, levels[0], "flow")
        landed = ddim_step(one, start, levels[0], levels[-1], "flow")
        torch.testing.assert_close(landed, z, rtol=1e-4, atol=1e-4)


def test_a_teachers_number_of_steps_is_a_multiple():
    stock = scheduler(shift=3.0)
    with pytest.raises(ValueError, match="a teacher's 12 steps are no multiple of 8; it needs one, as 32 of 16"):
        nested_steps(schedule_of(stock), stock, 8, stock, 12)


@pytest.mark.parametrize("option", ["invert_sigmas", "stochastic_sampling"])
def test_what_is_no_flow_from_noise_to_the_sample_is_refused(option):
    for refuse in (check_flow, schedule_of, lambda s: check_sampling(s, 4, FlowSteps())):
        with pytest.raises(ValueError, match=f"FlowMatchEulerDiscreteScheduler has {option}=True, which is not"):
            refuse(scheduler(**{option: True}))


def test_a_shift_by_resolution_is_that_of_as_many_tokens():
    by_tokens = scheduler(**BY_RESOLUTION)
    assert resolution_shift(by_tokens, 256) == pytest.approx(0.5)
    assert resolution_shift(by_tokens, 4096) == pytest.approx(1.15)
    with pytest.raises(ValueError, match="no scheduler for this model's pipeline"):
        check_sampling(by_tokens, 4)
