"""Schedulers: what one may take the place of, what it keeps, and which ones a pipeline can be sampled with at all."""

import inspect
import json
import logging
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from slimstep.eval.sampling import Sampler
from slimstep.models.edm import Preconditioned, is_edm
from slimstep.models.flow import is_continuous, is_flow
from slimstep.models.noise_schedule import schedule_of
from slimstep.models.pipeline import check_pipeline, load_pipeline
from slimstep.models.schedulers import (
    ONE_SPACING,
    SHORT,
    can_keep,
    check_noise_schedule,
    check_sampling,
    scheduler_class,
    swapped_scheduler,
    used_spacing,
)
from slimstep.models.single_file import scheduler_with
from tests.tiny import small_pipeline

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {**BETAS, "prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
SPACINGS = ("leading", "linspace", "trailing")
NO_ZERO_SNR = {"heun", "lms", "dpm2", "dpm2_a", "deis", "dpmsolver_single", "pndm"}


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    monkeypatch.setattr(logging.getLogger("slimstep"), "propagate", True)


def all_schedulers():
    """Every scheduler of diffusers that can be made without arguments and without further libraries."""
    for name in dir(diffusers):
        if name.endswith("Scheduler"):
            try:
                yield getattr(diffusers, name)()
            except (TypeError, ImportError):
                continue


SCHEDULERS = {type(scheduler).__name__: scheduler for scheduler in all_schedulers()}


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_draws_what_the_stock_one_draws_or_is_refused_in_one_line(pipeline, name):
    pipeline.register_modules(scheduler=SCHEDULERS[name])

    def drawn(steps):
        sampler = Sampler(pipeline, steps, 1.0)
        ours = sampler.images(pipeline.unet, ["a cat"], [0])[0].permute(1, 2, 0)
        draw = {"generator": sampler.generators([0]), "guidance_scale": 1.0, "num_inference_steps": steps}
        stock = pipeline(["a cat"], latents=sampler.noise(0)[None], **draw).images[0]
        assert torch.equal(ours, torch.from_numpy(np.array(stock)))

    try:
        drawn(2)
    except ValueError as error:
        assert "\n" not in str(error) and name in str(error)
        with pytest.raises((AttributeError, TypeError, ValueError, KeyError, ZeroDivisionError, IndexError)):
            pipeline(["a cat"], num_inference_steps=2, guidance_scale=1.0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_is_read_off_betas_or_refused_in_one_line(name):
    scheduler = SCHEDULERS[name]
    try:
        schedule = schedule_of(scheduler)
    except ValueError as error:
        assert "\n" not in str(error)
        refused = not hasattr(scheduler, "alphas_cumprod") or "prediction_type" not in scheduler.config
        assert refused, "it has betas"
    else:
        if is_flow(scheduler):
            assert schedule.prediction_type == "flow"
        elif is_edm(scheduler):
            assert schedule.prediction_type == Preconditioned(sigma_data=0.5, sign=1)
        else:
            torch.testing.assert_close(schedule.alpha_T**2, scheduler.alphas_cumprod.float())


WITHOUT_BETAS = [
    EDMEulerScheduler(), EDMDPMSolverMultistepScheduler(), FlowMatchEulerDiscreteScheduler(), IPNDMScheduler(),
    DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
]  # fmt: skip


@pytest.mark.parametrize("own", WITHOUT_BETAS, ids=lambda own: type(own).__name__)
def test_what_was_not_trained_on_betas_is_given_no_other_scheduler(own):
    """Flow matching and EDM are trained all the same, others not."""
    trained = [] if is_continuous(own) else [schedule_of]
    for refuse in (*trained, check_noise_schedule, lambda s: swapped_scheduler(s, "ddim")):
        with pytest.raises(ValueError, match=f"the model's {type(own).__name__} has .*EDM and flow matching"):
            refuse(own)


def test_a_model_is_refused_another_scheduler_before_its_weights_are_read(pipeline, tmp_path):
    pipeline.register_modules(scheduler=EDMEulerScheduler())
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="EDMEulerScheduler has no noise schedule of betas"):
        check_pipeline(tmp_path, scheduler="ddim")
    assert isinstance(load_pipeline(tmp_path).scheduler, EDMEulerScheduler)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("EDMEulerScheduler", "NoSuchScheduler"))
    with pytest.raises(ValueError, match="has no scheduler that can be read"):
        check_pipeline(tmp_path, scheduler="ddim")


# ---- what is kept

OWN = {
    "ddim": DDIMScheduler(**ZERO_SNR),
    "euler": EulerDiscreteScheduler(**ZERO_SNR),
    "dpmsolver++": DPMSolverMultistepScheduler(**ZERO_SNR),
    "plain": DDIMScheduler(**BETAS, steps_offset=1),
    "cosine": DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
    "trained": PNDMScheduler(trained_betas=np.linspace(1e-4, 0.02, 1000).tolist()),
    "sigmoid": DDPMScheduler(beta_schedule="sigmoid"),
    "zero by trained betas": DDIMScheduler(trained_betas=[*np.linspace(1e-4, 0.02, 999), 1.0]),
    "unread": HeunDiscreteScheduler.from_config({**ZERO_SNR}),
}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
@pytest.mark.parametrize("name", SHORT)
def test_the_schedule_that_was_trained_on_is_kept_or_the_sampler_refused(own, name):
    try:
        swapped = swapped_scheduler(own, name)
    except ValueError as error:
        message = str(error)
        assert f"model.scheduler={name} cannot keep the noise schedule" in message and "\n" not in message
        assert name not in message.partition("choose from ")[2].split(", ")
    else:
        ours, theirs = schedule_of(swapped), schedule_of(own)
        torch.testing.assert_close(ours.alpha_T, theirs.alpha_T, atol=3e-4, rtol=1e-4)  # some write 2^-12 for 0
        assert ours.prediction_type == theirs.prediction_type
        assert not hasattr(swapped, "sigmas") or torch.as_tensor(swapped.sigmas).isfinite().all()


def test_zero_terminal_snr_is_refused_by_those_that_have_no_such_field():
    able = [name for name in SHORT if can_keep(scheduler_class(name), OWN["ddim"])]
    assert set(able) == SHORT.keys() - NO_ZERO_SNR
    message = f"(rescale_betas_zero_snr=True); choose from {', '.join(able)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        swapped_scheduler(OWN["ddim"], "heun")


@pytest.mark.parametrize("name", SHORT)
def test_one_spacing_is_that_of_the_classes_that_read_no_other(name):
    kind, grids = scheduler_class(name), set()
    for spacing in SPACINGS:
        scheduler = kind.from_config({**BETAS, "timestep_spacing": spacing, "skip_prk_steps": True})
        scheduler.set_timesteps(4)
        grids.add(tuple(scheduler.timesteps.tolist()))
    assert (len(grids) == 1) == (kind.__name__ in ONE_SPACING)


SPACED = [
    (PNDMScheduler(**BETAS), "leading"),  # as SD-1.5's file, which names none
    (DDIMScheduler(**BETAS), "leading"),
    (EulerDiscreteScheduler(**BETAS), "linspace"),
    (DDIMScheduler(**BETAS, timestep_spacing="trailing"), "trailing"),
    (DPMSolverSinglestepScheduler.from_config({**BETAS, "timestep_spacing": "leading"}), "linspace"),  # not read
    (LCMScheduler(**BETAS, timestep_spacing="leading"), "trailing"),
]


@pytest.mark.parametrize(("own", "spacing"), SPACED, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmsolver++", "pndm"])
def test_the_spacing_that_the_own_sampler_uses_is_kept(own, spacing, name, saved, tmp_path):
    if saved:
        own.save_pretrained(tmp_path)
        own = type(own).from_pretrained(tmp_path)
    swapped = swapped_scheduler(own, name)
    assert swapped.config.timestep_spacing == used_spacing(swapped) == used_spacing(own) == spacing


@pytest.mark.parametrize("name", ["dpmsolver_single", "lcm", "tcd"])
def test_another_spacing_is_said(name, caplog):
    swapped = swapped_scheduler(PNDMScheduler(**BETAS), name)
    own = used_spacing(swapped)
    message = f"model.scheduler={name} spaces its timesteps {own}, always; the model's own sampler uses leading"
    assert message in caplog.text and swapped.config.timestep_spacing == own != "leading"


def test_thresholding_that_keeps_the_guided_noise_is_said(caplog):
    for name, thresholds in (("ddim", True), ("ddim", False), ("dpmsolver++", True)):
        caplog.clear()
        swapped_scheduler(DDPMScheduler(**BETAS, thresholding=thresholds), name)
        assert ("keeps the guided noise" in caplog.text) is (name == "ddim" and thresholds)


def test_what_the_own_sampler_does_and_the_other_cannot_is_said(caplog):
    own = DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True, thresholding=True)
    swapped_scheduler(own, "euler_a")
    assert "model.scheduler=euler_a has no thresholding, use_karras_sigmas, which" in caplog.text
    caplog.clear()
    swapped_scheduler(PNDMScheduler(**BETAS), "deis")
    assert "model.scheduler=deis ends at σ = 0.0292, not in clean latents" in caplog.text
    caplog.clear()
    swapped_scheduler(DDIMScheduler(**BETAS, clip_sample=False), "euler")
    assert not caplog.text, "nothing was lost"


def test_clipping_is_the_own_samplers():
    assert swapped_scheduler(DDIMScheduler(**BETAS), "tcd").config.clip_sample
    assert not swapped_scheduler(DDIMScheduler(**BETAS, clip_sample=False), "ddpm").config.clip_sample
    assert not swapped_scheduler(PNDMScheduler(**BETAS), "ddim").config.clip_sample


@pytest.mark.parametrize("name", SHORT)
def test_a_solver_is_not_given_the_options_of_another(name):
    own = DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++", solver_order=3)
    swapped = swapped_scheduler(own, name)
    if not isinstance(swapped, type(own)):
        plain = type(swapped)()
        for field in ("algorithm_type", "solver_order"):
            assert swapped.config.get(field) == plain.config.get(field)


def test_what_a_single_file_tells_is_not_taken_for_a_default(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**BETAS, "_class_name": "EulerDiscreteScheduler"}))
    fields = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    for kind in (EulerDiscreteScheduler, PNDMScheduler):
        made = scheduler_with(kind.from_pretrained(tmp_path), fields)
        assert {key: made.config[key] for key in fields} == fields
        assert made.config.timestep_spacing == inspect.signature(kind.__init__).parameters["timestep_spacing"].default


# ---- steps


@pytest.mark.parametrize(("steps", "nearest"), [(1, 4), (2, 4), (3, 4)])
def test_steps_that_a_scheduler_cannot_make_are_refused_with_the_nearest_that_it_can(pipeline, steps, nearest):
    pipeline.register_modules(scheduler=PNDMScheduler(**BETAS))
    with pytest.raises(ValueError, match=f"PNDMScheduler cannot make {steps} steps; the nearest it can make is 4"):
        Sampler(pipeline, steps, 1.0)
    assert Sampler(pipeline, nearest, 1.0)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", SHORT)
def test_a_few_steps_of_any_sampler_are_drawn_as_in_the_pipeline(pipeline, name, steps):
    own = pipeline
    own.register_modules(scheduler=swapped_scheduler(DDIMScheduler(**BETAS), name))
    sampler = Sampler(own, steps, 1.0)
    images = sampler.images(own.unet, ["a cat"], [0])[0].permute(1, 2, 0)
    draw = {"generator": sampler.generators([0]), "num_inference_steps": steps, "guidance_scale": 1.0}
    stock = own(["a cat"], latents=sampler.noise(0)[None], **draw).images[0]
    assert torch.equal(images, torch.from_numpy(np.array(stock)))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, LCMScheduler])
def test_noise_prediction_without_any_image_is_named_and_not_called_damage(pipeline, kind, spacing):
    options = {**ZERO_SNR, "prediction_type": "epsilon", "timestep_spacing": spacing}
    pipeline.register_modules(scheduler=kind(**options))
    if used_spacing(pipeline.scheduler) == "leading":
        assert Sampler(pipeline, 2, 1.0).images(pipeline.unet, ["a cat"], [0]).float().std() > 0
        return
    with pytest.raises(ValueError, match="predicts ε, and at timestep 999 .* zero terminal SNR") as caught:
        Sampler(pipeline, 2, 1.0)
    assert "damaged" not in str(caught.value)


def test_infinite_sigmas_are_named():
    with pytest.raises(ValueError, match="EulerDiscreteScheduler starts at an infinite σ"):
        check_sampling(EulerDiscreteScheduler(trained_betas=[*np.linspace(1e-4, 0.02, 999), 1.0]), 4)
