"""ε-, v- and sample-prediction in every objective and in sampling: what a network says counts, not in which terms.

`Knowing` is a network that knows what x̂ it means, and tells it as ε, v or x0.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from slimstep.distill.consistency import ConsistencyDistillation
from slimstep.distill.guidance import GuidanceDistillation
from slimstep.distill.prediction import Denoising
from slimstep.distill.recovery import Recovery
from slimstep.distill.steps import StepDistillation
from slimstep.distill.teaching import WEIGHTINGS, StepSchedule
from slimstep.eval.sampling import Sampler
from slimstep.models.conditioning import Conditioning
from slimstep.models.noise_schedule import PREDICTION_TYPES, pred_of, schedule_of
from slimstep.models.schedulers import swapped_scheduler
from slimstep.prune.stochastic_depth import StochasticDepth
from tests.tiny import DENOISER, WIDTH, no_caption, tiny_pipeline

EMPTY, OFF = no_caption(), 0.1
SIMPLE = {
    "denoising": Denoising,
    "recovery": Recovery,
    "stochastic depth": lambda *given: StochasticDepth(*given, skip_prob={"resnet": 0.3, "attention": 0.1}),
}
STEPPING = {
    "steps": (StepDistillation, {}, 0),
    "steps, guided": (StepDistillation, {"guided_share": 0.5}, 0),
    "guidance": (GuidanceDistillation, {}, 32),
    "consistency": (ConsistencyDistillation, {"grid_steps": 10}, 32),
}


class Knowing(nn.Module):
    """x̂ is `x0` where given, and `tell` + a function of latents, timestep and text otherwise; off by `off` as told."""

    kinds, kept_blocks, dtype = {"a": "resnet", "b": "attention"}, ("a", "b"), torch.float32

    def __init__(self, schedule, x0=None, off=0.0, gain=1.0, width=0):
        super().__init__()
        self.schedule, self.x0, self.off = schedule, x0, off
        self.gain, self.mid_block = nn.Parameter(torch.tensor(gain)), nn.Identity()
        self.config = SimpleNamespace(time_cond_proj_dim=width, in_channels=4, sample_size=8)

    def forward(self, z_BCHW, t, encoder_hidden_states, timestep_cond=None, block_mask=None, **_):
        t_B, self.z = t.long().expand(len(z_BCHW)), self.mid_block(z_BCHW)
        own_B111 = encoder_hidden_states.mean((1, 2))[:, None, None, None]
        own = own_B111 + (1e-3 * t_B[:, None, None, None] + 0.5 * z_BCHW).tanh()
        if timestep_cond is not None:
            own = own + 0.1 * timestep_cond.mean(1)[:, None, None, None]
        x0_BCHW = self.gain * own if self.x0 is None else self.x0.repeat(2, 1, 1, 1)[: len(z_BCHW)]
        level, kind = self.schedule.alpha_sigma(t_B), self.schedule.prediction_type
        return (pred_of(x0_BCHW, z_BCHW, level, kind) + self.off,)


def scheduler(prediction_type, **options):
    """Every α is above 0, so that ε tells an image at every timestep."""
    own = tiny_pipeline(prediction_type).scheduler
    return type(own).from_config(own.config, timestep_spacing="trailing", set_alpha_to_one=True, **options)


def batch(rows=6):
    draw = torch.Generator().manual_seed(1)
    latents, text = torch.randn(rows, 4, 8, 8, generator=draw), torch.randn(rows, 5, WIDTH, generator=draw)
    return {"latents": latents, "text": text, "progress": 0.5}


def stepping(name, prediction_type, x0=None, off=0.0, **options):
    """The loss of a student beside a teacher that means another x̂."""
    kind, own, width = STEPPING[name]
    one = scheduler(prediction_type)
    schedule = schedule_of(one)
    teacher = Knowing(schedule, x0)
    student = Knowing(schedule, x0, off, 1.2, width)
    objective = kind(DENOISER, schedule, EMPTY, teacher, StepSchedule(one, 10, one, 5), **own, **options)
    loss, metrics = objective(student, batch(), torch.Generator().manual_seed(0))
    return schedule, objective, student, loss, metrics


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SIMPLE)
def test_the_loss_of_a_perfect_prediction_is_zero_and_else_its_squared_error(name, prediction_type):
    schedule = schedule_of(scheduler(prediction_type))
    perfect = Knowing(schedule, batch()["latents"])
    objective = SIMPLE[name](DENOISER, schedule, EMPTY, perfect)
    loss, _ = objective(perfect, batch(), torch.Generator().manual_seed(0))
    assert loss == pytest.approx(0, abs=1e-6)
    near = Knowing(schedule, batch()["latents"], OFF)
    loss, metrics = objective(near, batch(), torch.Generator().manual_seed(0))
    # The recovery objective counts the error to the target and to the teacher, which is perfect.
    assert loss == pytest.approx(OFF**2 * (2 if name == "recovery" else 1), rel=1e-3), metrics


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["steps", "guidance"])
def test_an_error_of_the_prediction_weighs_what_it_is_worth_in_the_image(name, prediction_type):
    """x̂ moves by σ/α of what ε moves by, by σ of v, by all of x0; the teacher and the student know the image."""
    guided = {"guided_share": 0.0, "caption_dropout": 0.0} if name == "steps" else {}
    schedule, objective, _, loss, metrics = stepping(
        name, prediction_type, batch()["latents"], OFF, weighting="uniform", **guided
    )
    draw = torch.Generator().manual_seed(0)
    if name == "steps":
        torch.rand(6, generator=draw)  # dropped captions
    t_B = objective.bounds_NK[torch.randint(len(objective.bounds_NK), (6,), generator=draw), 0]
    alpha_B, sigma_B = schedule.alpha_T[t_B], schedule.sigma_T[t_B]
    worth_B = {"epsilon": sigma_B / alpha_B, "v_prediction": sigma_B, "sample": torch.ones(6)}[prediction_type]
    expected = OFF**2 * worth_B.square().mean().item()
    if name == "steps":
        assert metrics["original"] == pytest.approx(OFF**2, rel=1e-3)
        assert metrics["distillation"] == pytest.approx(expected, rel=1e-2)
        expected *= 1 + objective.original_weight
    assert loss == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("name", STEPPING)
def test_what_is_distilled_does_not_depend_on_what_the_networks_predict(name):
    options = {} if name == "consistency" else {"weighting": "uniform"}
    losses, slopes = [], []
    for prediction_type in PREDICTION_TYPES:
        _, _, student, loss, metrics = stepping(name, prediction_type, **options)
        loss = metrics.get("distillation", loss)
        (slope,) = torch.autograd.grad(loss, student.gain)
        losses.append(loss.item()), slopes.append(slope.item())
    assert losses[0] > 1e-3 and slopes[0] != 0
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-2)
    assert slopes[1:] == pytest.approx([slopes[0]] * 2, rel=1e-2)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", STEPPING)
def test_every_loss_and_its_slope_are_finite(name, weighting, prediction_type):
    options = {} if name == "consistency" else {"weighting": weighting}
    _, _, student, loss, _ = stepping(name, prediction_type, **options)
    loss.backward()
    assert loss.isfinite() and student.gain.grad.isfinite() and student.gain.grad != 0


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmsolver++", "unipc", "lcm", "ddpm"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sampling_draws_the_same_whatever_the_network_predicts(name, guidance_scale):
    drawn = []
    for prediction_type in PREDICTION_TYPES:
        pipeline = tiny_pipeline(prediction_type)
        schedule = schedule_of(pipeline.scheduler)
        pipeline.register_modules(scheduler=swapped_scheduler(pipeline.scheduler, name))
        sampler = Sampler(pipeline, 4, guidance_scale)
        noise = torch.stack([sampler.noise(i) for i in range(3)])
        drawn.append(sampler.latents(Knowing(schedule), Conditioning({"text": batch(3)["text"]}), noise, uncond=EMPTY))
    assert drawn[0].isfinite().all() and drawn[0].std() > 0.1
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], rtol=1e-2, atol=1e-2)
