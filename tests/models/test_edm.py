"""EDM's laws: preconditioning as the paper and diffusers have it, steps of stock schedulers, a teacher within its
student's, and a pipeline of its kind (Playground v2.5) drawn, trained on and exported."""

import math

import pytest
import torch
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)

from slimstep.data.encoding import encode_images
from slimstep.eval.sampling import Sampler
from slimstep.models.edm import check_edm, is_edm, sigma_at, sigmas_of, stretched_edm, time_of
from slimstep.models.family import schedule_for
from slimstep.models.flow import eulers, prediction_type_of, stretched
from slimstep.models.noise_schedule import (
    LEAST_SIGMA,
    VarianceExploding,
    add_noise,
    are_among,
    ddim_step,
    eps_of,
    nested_steps,
    pred_of,
    schedule_of,
    snr,
    target_of,
    trained_at_steps,
    x0_between,
    x0_of,
)
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from slimstep.models.schedulers import check_sampling
from tests.tiny import tiny_edm_pipeline

SVD = {
    "timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True, "sigma_min": 0.002,
    "sigma_max": 700.0, "timestep_spacing": "leading", "steps_offset": 1, "beta_schedule": "scaled_linear",
}  # fmt: skip
KINDS = {
    "Playground v2.5": EDMDPMSolverMultistepScheduler(sigma_data=0.5),
    "Euler": EDMEulerScheduler(sigma_data=0.5),
    "CosXL": EDMEulerScheduler(
        sigma_data=1.0, sigma_max=120.0, sigma_schedule="exponential", prediction_type="v_prediction"
    ),
    "Stable Video Diffusion": EulerDiscreteScheduler(**SVD),
}
FIRST_ORDER = [kind for kind in KINDS if kind != "Playground v2.5"]


@pytest.fixture
def draws():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, 8, 8, generator=draw) for _ in range(3)]


SIGMAS = torch.tensor([0.01, 0.5, 3.0, 80.0])


@pytest.mark.parametrize("kind", KINDS)
def test_sample_and_noise_come_back_from_what_is_noised(kind, draws):
    x0, noise, _ = draws
    schedule = schedule_of(KINDS[kind])
    level, F = schedule.alpha_sigma(time_of(SIGMAS)), schedule.prediction_type
    z, pred = add_noise(x0, noise, level), target_of(x0, noise, level, F)
    torch.testing.assert_close(x0_of(pred, z, level, F), x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(eps_of(pred, z, level, F), noise, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pred_of(x0, z, level, F), pred, rtol=1e-2, atol=1e-2)  # z − α x0 loses digits at 0.01
    torch.testing.assert_close(snr(level), 1 / SIGMAS**2)


@pytest.mark.parametrize("kind", ["Playground v2.5", "Euler", "CosXL"])
def test_preconditioning_is_diffusers(kind, draws):
    """c_in, c_skip, c_out and c_noise of a stock scheduler, and so the paper's (table 1)."""
    x0, noise, pred = draws
    scheduler, schedule = KINDS[kind], schedule_of(KINDS[kind])
    for n, sigma in enumerate(SIGMAS):
        t = scheduler.precondition_noise(sigma)[None]
        level, x = schedule.alpha_sigma(t), x0[n : n + 1] + sigma * noise[n : n + 1]
        z = add_noise(x0[n : n + 1], noise[n : n + 1], level)
        torch.testing.assert_close(z, scheduler.precondition_inputs(x, sigma))
        denoised = scheduler.precondition_outputs(x, pred[n : n + 1], sigma)
        torch.testing.assert_close(x0_of(pred[n : n + 1], z, level, schedule.prediction_type), denoised)


def test_the_squared_error_of_F_is_the_papers_weighted_error_of_the_sample(draws):
    """λ(σ) ‖D − x0‖² with λ = (σ² + σ_d²) / (σ σ_d)² (Karras et al. 2022, table 1)."""
    x0, noise, pred = draws
    schedule, sigma_data = schedule_of(KINDS["Euler"]), 0.5
    level, F = schedule.alpha_sigma(time_of(SIGMAS)), schedule.prediction_type
    error = (pred - target_of(x0, noise, level, F)).square().mean((1, 2, 3))
    of_sample = (x0_of(pred, add_noise(x0, noise, level), level, F) - x0).square().mean((1, 2, 3))
    weight = (SIGMAS**2 + sigma_data**2) / (SIGMAS * sigma_data) ** 2
    torch.testing.assert_close(error, weight * of_sample, rtol=1e-3, atol=1e-4)


def test_targets_have_unit_variance_where_samples_have_the_deviation_that_is_said():
    draw = torch.Generator().manual_seed(0)
    x0, noise = 0.5 * torch.randn(4, 100_000, generator=draw), torch.randn(4, 100_000, generator=draw)
    schedule = schedule_of(KINDS["Euler"])
    level = schedule.alpha_sigma(time_of(SIGMAS))
    ones = torch.ones(4)
    torch.testing.assert_close(add_noise(x0, noise, level).var(1), ones, rtol=0.03, atol=0)
    torch.testing.assert_close(target_of(x0, noise, level, schedule.prediction_type).var(1), ones, rtol=0.03, atol=0)


@pytest.mark.parametrize(("kind", "mean", "std"), [("Euler", -1.2, 1.2), ("Stable Video Diffusion", 0.7, 1.6)])
def test_training_sigmas_are_log_normal(kind, mean, std):
    """As Karras et al. 2022, table 1, and Blattmann et al. 2023 have it."""
    t = schedule_of(KINDS[kind]).sample_times(4000, torch.Generator().manual_seed(0))
    log_sigma = sigma_at(t).log()
    assert abs(log_sigma.mean() - mean) < 0.08 and abs(log_sigma.std() - std) < 0.06


@pytest.mark.parametrize("steps", [1, 2, 4, 25])
@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_is_the_stock_schedulers(kind, steps):
    scheduler = KINDS[kind]
    starts, ends = schedule_of(scheduler).grid(scheduler, steps).T
    scheduler.set_timesteps(steps)
    assert torch.equal(starts, scheduler.timesteps) and torch.equal(starts[1:], ends[:-1]) and ends[-1] == -math.inf
    torch.testing.assert_close(sigma_at(starts), scheduler.sigmas[:-1], rtol=1e-5, atol=0)
    check_sampling(scheduler, steps)


@pytest.mark.parametrize("kind", FIRST_ORDER)
def test_a_ddim_step_is_the_stock_schedulers_step(kind, draws):
    """Of what networks see, c_in x; the last lands at the sample / σ_d."""
    scheduler, schedule = KINDS[kind], schedule_of(KINDS[kind])
    z, pred, _ = draws
    grid = schedule.grid(scheduler, 4)
    scheduler.set_timesteps(4)
    for t, (start, end) in zip(scheduler.timesteps, grid[:, :, None], strict=True):
        here, there = schedule.alpha_sigma(start), schedule.alpha_sigma(end)
        x = z / here[0]
        torch.testing.assert_close(scheduler.scale_model_input(x, t), z, rtol=1e-4, atol=1e-5)
        landed = scheduler.step(pred, t, x).prev_sample * there[0]
        torch.testing.assert_close(
            ddim_step(pred, z, here, there, schedule.prediction_type), landed, rtol=1e-4, atol=1e-4
        )


def test_a_solver_of_higher_order_gives_way_to_eulers_steps_on_the_same_sigmas():
    solver = EDMDPMSolverMultistepScheduler(sigma_max=40.0, sigma_data=0.7, rho=5.0, prediction_type="v_prediction")
    euler = eulers(solver)
    assert type(euler) is EDMEulerScheduler and eulers(euler) is euler
    ours, theirs = schedule_of(euler), schedule_of(solver)
    assert ours == theirs and prediction_type_of(euler) == "edm"
    torch.testing.assert_close(ours.grid(euler, 6), theirs.grid(solver, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_shares_are_the_inverse_of_times(kind):
    schedule, share = schedule_of(KINDS[kind]), torch.linspace(0, 1, 9)
    t = schedule.time_at(share)
    torch.testing.assert_close(schedule.share_at(t), share, rtol=1e-4, atol=1e-5)
    ends = torch.tensor([sigmas_of(KINDS[kind]).sigma_min, sigmas_of(KINDS[kind]).sigma_max])
    torch.testing.assert_close(sigma_at(t[[0, -1]]), ends, rtol=1e-4, atol=0)
    assert schedule.share_at(torch.tensor(-math.inf)) < 1e-6


@pytest.mark.parametrize("kind", FIRST_ORDER)
def test_each_of_a_students_steps_removes_noise_and_its_grid_nests_in_the_teachers(kind):
    """Stock, the last step starts at σ_min; here it starts where the last of as many equal shares does."""
    scheduler, schedule = KINDS[kind], schedule_of(KINDS[kind])
    for steps in (2, 4, 8):
        few, many = stretched(scheduler, steps, None), stretched(scheduler, 2 * steps, None)
        starts = schedule.grid(few, steps)[:, 0]
        shares = torch.arange(steps, 0, -1) / steps
        torch.testing.assert_close(schedule.share_at(starts), shares, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(schedule.grid(many, 2 * steps)[::2, 0], starts, rtol=1e-4, atol=1e-4)
    assert schedule.grid(stretched_edm(scheduler, 1), 1)[0].tolist()[1] == -math.inf
    torch.testing.assert_close(sigma_at(schedule.grid(scheduler, 4)[-1, 0]), torch.tensor(0.002), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", FIRST_ORDER)
def test_a_teacher_steps_within_its_students_steps(kind, draws):
    scheduler, schedule = KINDS[kind], schedule_of(KINDS[kind])
    student = stretched(scheduler, 4, None)
    bounds = nested_steps(schedule, student, 4, scheduler, 8)
    assert torch.equal(bounds[:, [0, -1]], schedule.grid(student, 4)[: len(bounds)])
    assert bounds.shape[1] == 3 and (bounds[:, :-1] > bounds[:, 1:]).all()
    assert (schedule.alpha_sigma(bounds[:, 0])[1] >= LEAST_SIGMA).all()
    pred, z, _ = draws
    start, middle, end = (schedule.alpha_sigma(t.expand(4)) for t in bounds[0])
    F = schedule.prediction_type
    landed = ddim_step(pred, ddim_step(pred, z, start, middle, F), middle, end, F)
    assumed = x0_between(z, start, landed, end)
    one_step = ddim_step(pred_of(assumed, z, start, F), z, start, end, F)
    torch.testing.assert_close(one_step, landed, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="a teacher's 6 steps are no multiple of 4"):
        nested_steps(schedule, student, 4, scheduler, 6)


def test_a_last_step_with_next_to_no_noise_is_left_out_of_the_training():
    scheduler = KINDS["Euler"]
    schedule = schedule_of(scheduler)
    assert len(nested_steps(schedule, scheduler, 4, scheduler, 8)) == 3


def test_a_network_of_a_few_steps_is_trained_at_their_times_alone():
    scheduler = KINDS["Euler"]
    few = trained_at_steps(schedule_of(scheduler), stretched_edm(scheduler, 4), 4)
    times = few.sample_times(64, torch.Generator().manual_seed(0))
    assert are_among(times, few.trained_N, few)
    assert not are_among(schedule_of(scheduler).grid(scheduler, 4)[:, 0], few.trained_N, few)


WRONG = {
    "prediction_type=sample": EDMDPMSolverMultistepScheduler(prediction_type="sample"),
    "final_sigmas_type=sigma_min": EDMEulerScheduler(final_sigmas_type="sigma_min"),
    "sigma_min=90": EDMEulerScheduler(sigma_min=90.0),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_scheduler_that_is_not_the_papers_is_refused_by_name(what):
    for refuse in (check_edm, schedule_of):
        with pytest.raises(ValueError, match=f"the model's {type(WRONG[what]).__name__} has {what}"):
            refuse(WRONG[what])


@pytest.mark.parametrize("kind", ["Playground v2.5", "Euler"])
def test_a_pipeline_draws_what_the_stock_one_draws(kind):
    """Playground v2.5: SDXL's network, and latents normalised by the VAE's mean and deviation."""
    pipeline = tiny_edm_pipeline(KINDS[kind])
    sampler = Sampler(pipeline, 3, 3.0)
    ours = sampler.images(pipeline.unet, ["a cat", "a dog"], [0, 1])
    noise = torch.stack([sampler.noise(0), sampler.noise(1)])
    stock = pipeline(
        ["a cat", "a dog"], latents=noise, guidance_scale=3.0, num_inference_steps=3, height=16, width=16,
        output_type="np",
    ).images  # fmt: skip
    stock = torch.from_numpy((stock * 255).round()).permute(0, 3, 1, 2)
    assert (ours.float() - stock).abs().max() <= 1 and ours.float().std() > 1
    assert sampler.protocol["prediction_type"] == "edm"


def test_latents_of_images_are_normalised_as_the_pipeline_unscales_them():
    pipeline = tiny_edm_pipeline(KINDS["Euler"])
    images = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        raw = pipeline.vae.encode(images / 127.5 - 1).latent_dist.mode()
    mean, std = (torch.tensor(pipeline.vae.config[f"latents_{name}"]).view(1, 4, 1, 1) for name in ("mean", "std"))
    own = encode_images(pipeline, images, torch.device("cpu"))["latents"]
    torch.testing.assert_close(own, (raw - mean) * pipeline.vae.config.scaling_factor / std, rtol=1e-3, atol=1e-3)


def test_an_export_of_a_pruned_network_keeps_its_scheduler(tmp_path):
    pipeline = tiny_edm_pipeline(KINDS["Playground v2.5"])
    pipeline.save_pretrained(tmp_path / "teacher")
    loaded = load_pipeline(tmp_path / "teacher")
    block = "mid_block.attentions.0.transformer_blocks.2"
    slim = with_unet(loaded, loaded.unet.with_architecture({block: 0}))
    report = export_pipeline(slim, tmp_path / "slim")
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "slim", trust_remote_code=not report.is_stock)
    assert type(stock.scheduler) is EDMDPMSolverMultistepScheduler
    assert all(
        stock.scheduler.config[key] == value for key, value in pipeline.scheduler.config.items() if key[0] != "_"
    )
    assert stock.vae.config.latents_mean == pipeline.vae.config.latents_mean
    assert schedule_for(load_pipeline(tmp_path / "slim")) == schedule_for(loaded)


def test_a_continuous_euler_without_its_sigmas_is_not_edms():
    assert not is_edm(EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"))
    assert is_edm(EulerDiscreteScheduler(**SVD)) and isinstance(schedule_of(KINDS["CosXL"]), VarianceExploding)
