"""The noise schedule's laws, for the three things a network can predict."""

import pytest
import torch
from diffusers import DDIMScheduler

from models.schedule import PREDICTION_TYPES, NoiseSchedule

T_B = torch.tensor([0, 1, 250, 500, 998])


def scheduler(prediction_type="epsilon", zero_snr=False):
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
    )


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
