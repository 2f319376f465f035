"""The laws of step distillation, on a small UNet and a network that is one line."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimstep.distill.cached_targets import TargetInputs, with_targets
from slimstep.distill.consistency import ConsistencyDistillation
from slimstep.distill.guidance import GuidanceDistillation
from slimstep.distill.steps import StepDistillation
from slimstep.distill.teaching import (
    Draw,
    StepSchedule,
    Target,
    teacher_target,
    weights,
)
from slimstep.engine.config import TrainConfig
from slimstep.engine.loop import train
from slimstep.engine.run import Run
from slimstep.models.conditioning import conditioning_of
from slimstep.models.denoiser import guidance_embedding
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.guidance import guided, with_guidance_embedding
from slimstep.models.noise_schedule import PREDICTION_TYPES, add_noise, ddim_step, pred_of, schedule_of, snr
from tests.models.conftest import small_stock_unet
from tests.tiny import DENOISER, WIDTH, no_caption, slow

EMPTY = no_caption()
NO_GUIDANCE = torch.empty(0)


def scheduler(prediction_type="v_prediction", **options):
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="trailing", prediction_type=prediction_type,
        rescale_betas_zero_snr=prediction_type != "epsilon", **options,
    )  # fmt: skip


def step_schedule(steps, teacher_steps, prediction_type="v_prediction"):
    one = scheduler(prediction_type)
    return StepSchedule(one, teacher_steps, one, steps)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(size=6):
    return {
        "latents": torch.randn(size, 4, 8, 8, generator=draw(1)),
        "text": torch.randn(size, 5, WIDTH, generator=draw(2)),
    }


def cond(size=6):
    return conditioning_of(batch(size), like=EMPTY)


class Samples(torch.utils.data.Dataset):
    """Six pairs that are encoded already."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {name: values[index] for name, values in batch().items()}


def objective(kind, teacher, way, **options):
    return kind(DENOISER, schedule_of(way.student_scheduler), EMPTY, teacher, way, **options)


@pytest.fixture(scope="module")
def unet():
    return small_stock_unet()


@pytest.fixture(scope="module")
def embedded():
    return small_stock_unet(time_cond_proj_dim=32)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("w", [None, 3.0])
def test_one_step_to_the_target_lands_where_the_teachers_two_steps_land(unet, prediction_type, w):
    way = step_schedule(4, 8, prediction_type)
    schedule = schedule_of(way.student_scheduler)
    x0, noise = (torch.randn(4, 4, 8, 8, generator=draw(seed)) for seed in (1, 2))
    # Every step of the student, the first and the last included.
    bounds_NK = way.bounds(schedule)
    z = add_noise(x0, noise, schedule.alpha_sigma(bounds_NK[:, 0]))
    start = Draw(x0, noise, z, bounds_NK, cond(4))
    w_G = NO_GUIDANCE if w is None else torch.full((4,), w)
    target = teacher_target(DENOISER, unet, schedule, start, EMPTY, w_G)
    assert target.x0_BCHW.isfinite().all() and (target.gap_B > 0).all()
    z = start.z_BCHW
    for t_B, s_B in zip(start.bounds_BK.T[:-1], start.bounds_BK.T[1:], strict=True):
        with torch.no_grad():
            pred = unet(z, t_B, start.cond.tensors["text"]).sample
            if w is not None:
                empty = unet(z, t_B, EMPTY.expand(4).tensors["text"]).sample  # a pass of its own
                pred = empty + w * (pred - empty)
        z = ddim_step(pred, z, schedule.alpha_sigma(t_B), schedule.alpha_sigma(s_B), prediction_type)
    first, last = schedule.alpha_sigma(start.t_B), schedule.alpha_sigma(start.end_B)
    pred = pred_of(target.x0_BCHW, start.z_BCHW, first, prediction_type)
    landed = ddim_step(pred, start.z_BCHW, first, last, prediction_type)
    torch.testing.assert_close(landed, z, rtol=1e-3, atol=1e-3)


def test_guidance_of_one_is_no_guidance_bit_for_bit(unet):
    inputs = batch()["latents"], torch.full((6,), 500), cond()
    with torch.no_grad():
        led, plain = guided(DENOISER, unet, *inputs, EMPTY, torch.ones(6))
    assert torch.equal(led, plain)


def test_only_the_first_rows_are_guided(unet):
    inputs = batch()["latents"], torch.full((6,), 500), cond()
    with torch.no_grad():
        led, plain = guided(DENOISER, unet, *inputs, EMPTY, torch.full((2,), 5.0))
        all_rows, _ = guided(DENOISER, unet, *inputs, EMPTY, 5.0)
    assert torch.equal(led[2:], plain[2:])
    assert (led[:2] != plain[:2]).any()
    torch.testing.assert_close(led[:2], all_rows[:2])


@pytest.mark.parametrize("weighting", ["truncated_snr", "snr_plus_one", "uniform"])
@pytest.mark.parametrize("guided_share", [0, 0.5, 1])
def test_a_teacher_has_nothing_to_learn_from_itself(unet, weighting, guided_share):
    options = {"weighting": weighting, "guided_share": guided_share, "original_weight": 0}
    with torch.no_grad():
        loss, _ = objective(StepDistillation, unet, step_schedule(8, 8), **options)(unet, batch(), draw())
        other, _ = objective(StepDistillation, unet, step_schedule(4, 8), **options)(unet, batch(), draw())
    assert loss < 1e-6 < other


def test_a_guidance_distilled_teacher_has_nothing_to_learn_from_itself(embedded):
    with torch.no_grad():
        options = {"weighting": "truncated_snr"}
        loss, _ = objective(GuidanceDistillation, embedded, step_schedule(8, 8), **options)(embedded, batch(), draw())
        other, _ = objective(GuidanceDistillation, embedded, step_schedule(4, 8), **options)(embedded, batch(), draw())
    assert loss < 1e-6 < other


def test_a_teacher_that_goes_at_once_leaves_all_of_its_own_error(unet):
    options = {"weighting": "relative", "guided_share": 0.5, "original_weight": 0}
    with torch.no_grad():
        loss, _ = objective(StepDistillation, unet, step_schedule(4, 8), **options)(unet, batch(), draw())
    assert loss.item() == pytest.approx(1, rel=1e-3)
    with pytest.raises(ValueError, match="relative needs a teacher with more steps than 8"):
        objective(StepDistillation, unet, step_schedule(8, 8), **options)


def test_truncated_snr_is_at_least_one():
    schedule, t_B = schedule_of(scheduler()), torch.arange(1000)
    nothing = torch.zeros(1000)
    start = Draw(nothing, nothing, nothing, t_B[:, None], EMPTY)
    target = Target(nothing, torch.full((1000,), 0.25))
    snr_B = snr(schedule.alpha_sigma(t_B))
    assert torch.equal(weights(schedule, start, target, "truncated_snr"), snr_B.clamp(min=1))
    assert torch.equal(weights(schedule, start, target, "snr_plus_one"), snr_B + 1)
    assert weights(schedule, start, target, "uniform").unique().tolist() == [1]
    assert weights(schedule, start, target, "relative").unique().tolist() == [4]


def test_the_original_loss_is_brought_to_the_size_of_the_distillation(unet):
    teach = objective(StepDistillation, unet, step_schedule(4, 8), original_weight=0.2)
    loss, metrics = teach(unet, batch(), draw())
    torch.testing.assert_close(loss, 1.2 * metrics["distillation"])
    unet.zero_grad()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


def test_a_guidance_distilled_student_begins_as_it_was(unet):
    prunable = PrunableUNet2DConditionModel.from_unet(unet).with_architecture({"mid_block.attentions.0": 0})
    z, t_B, text = batch()["latents"], torch.full((6,), 500), batch()["text"]
    with torch.no_grad():
        student, w_B = with_guidance_embedding(prunable, 32), torch.full((6,), 7.5)
        pred_x0 = DENOISER(student, z, t_B, cond(), guidance_B=w_B)
        assert torch.equal(pred_x0, prunable(z, t_B, text).sample)


def test_a_student_embeds_the_guidance_as_the_pipeline_does(embedded):
    pipeline_says = StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.tensor([6.5]), embedding_dim=32)
    assert torch.equal(guidance_embedding(torch.tensor([7.5]), 32), pipeline_says)
    inputs = batch()["latents"], torch.full((6,), 500), cond()
    with torch.no_grad():
        predictions = [DENOISER(embedded, *inputs, guidance_B=torch.full((6,), w)) for w in (2.0, 7.5)]
    assert (predictions[0] != predictions[1]).any()


def test_a_consistency_prediction_is_what_lcm_scheduler_takes_it_for(unet, embedded):
    lcm = LCMScheduler.from_config(scheduler().config)
    lcm.set_timesteps(4)
    assert set(lcm.timesteps.tolist()) <= set(step_schedule(50, 50).bounds(schedule_of(lcm))[:, 0].tolist())
    consistency = objective(ConsistencyDistillation, unet, step_schedule(50, 50))
    z, w_B = batch()["latents"], torch.full((6,), 3.0)
    for t in lcm.timesteps:
        t_B = t.expand(6)
        with torch.no_grad():
            pred = DENOISER(embedded, z, t_B, cond(), guidance_B=w_B)
            pred_x0 = consistency.consistency(embedded, z, t_B, cond(), w_B)
        torch.testing.assert_close(pred_x0, lcm.step(pred, t, z, generator=draw()).denoised, rtol=1e-4, atol=1e-4)
    assert torch.equal(consistency.consistency(embedded, z, torch.zeros(6, dtype=torch.long), cond(), w_B).detach(), z)


def test_consistency_distils_a_guided_teacher_into_a_guidance_embedding(unet, embedded):
    loss, _ = objective(ConsistencyDistillation, unet, step_schedule(50, 50))(embedded, batch(), draw())
    loss.backward()
    assert loss.isfinite() and embedded.time_embedding.cond_proj.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="has one stage"):
        objective(ConsistencyDistillation, embedded, step_schedule(50, 50))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_rows_are_guided_as_often_as_asked_whatever_the_batch(unet, share):
    teach = objective(StepDistillation, unet, step_schedule(4, 8), guided_share=share)
    led = [(teach.draw_guidance(math.ceil(share * 4), 4, draw(seed)) != 1).sum().item() for seed in range(2000)]
    assert sum(led) / (4 * 2000) == pytest.approx(share, abs=0.02)


def test_cached_teacher_targets_are_those_of_the_moment(tmp_path, unet):
    """The loss of a fixed draw does not depend on when the teacher was asked; a second run asks no more."""
    cached = objective(StepDistillation, unet, step_schedule(4, 8), guided_share=0, cached_draws=2)
    AcceleratorState._reset_state(True)
    draws = TargetInputs(Samples(), replace(cached.requires.cached_targets, caption_dropout=0.5), EMPTY, seed=0)
    place = ("stage", 4, tmp_path / "partial")
    run = Run(tmp_path, Accelerator(cpu=True))
    pairs = with_targets(draws, cached.compute_targets, run, *place)
    again = with_targets(draws, lambda batch: pytest.fail("computed twice"), run, *place)
    assert len(pairs) == 12 and {bool((pairs[j]["text"] == 0).all()) for j in range(12)} == {True, False}
    collated = torch.utils.data.default_collate([again[j] for j in range(12)])
    target, gap = cached.compute_targets(collated)
    torch.testing.assert_close(collated["target"], target, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(collated["gap"], gap, rtol=1e-3, atol=1e-5)
    loss, metrics = cached(unet, collated, draw())
    assert metrics["distillation"].item() == pytest.approx(1, rel=1e-2)  # the student is the teacher, going at once
    with pytest.raises(ValueError, match="cached_draws=2 needs guided_share=0"):
        objective(StepDistillation, unet, step_schedule(4, 8), cached_draws=2)


def test_what_an_objective_cannot_use_is_named(unet):
    with pytest.raises(ValueError, match="weighting='min_snr' is unknown"):
        objective(StepDistillation, unet, step_schedule(4, 8), weighting="min_snr")
    with pytest.raises(ValueError, match="guided_share=2"):
        objective(StepDistillation, unet, step_schedule(4, 8), guided_share=2)
    with pytest.raises(ValueError, match=r"guidance_range=\[8, 2\]"):
        objective(GuidanceDistillation, unet, step_schedule(4, 8), guidance_range=[8, 2])


def test_a_bfloat16_teacher_teaches_a_float32_student_and_nothing_becomes_float16(unet):
    teacher, seen = copy.deepcopy(unet).to(torch.bfloat16), set()

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            seen.update(x.dtype for x in tree_leaves(result) if torch.is_tensor(x))
            return result

    teach = objective(StepDistillation, teacher, step_schedule(4, 8), guided_share=0.5)
    unet.zero_grad()
    with Dtypes(), torch.autocast("cpu", torch.bfloat16):
        loss, _ = teach(unet, batch(), draw())
    loss.backward()
    assert torch.float16 not in seen and torch.bfloat16 in seen
    assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in unet.parameters())


@pytest.mark.parametrize("name", ["sd21", *slow("sd15")])
@pytest.mark.parametrize("kind", [StepDistillation, ConsistencyDistillation])
def test_gradient_checkpointing_changes_memory_and_nothing_else(tmp_path, name, kind):
    """With accumulation and EMA, on SD-1.5's and SD-2.1's topologies."""
    config, trained = TrainConfig(steps=2, batch_size=2, accumulation=2, learning_rate=1e-3, warmup_steps=1), []
    way = step_schedule(4, 8) if kind is StepDistillation else step_schedule(50, 50)
    width = {"time_cond_proj_dim": 32} if kind.requires.guidance_embedding else {}
    for checkpointing in (False, True):
        AcceleratorState._reset_state(True)
        student = PrunableUNet2DConditionModel.from_unet(small_stock_unet(name, **width))
        teacher = small_stock_unet(name).requires_grad_(False)
        run = Run(tmp_path / str(checkpointing), Accelerator(cpu=True))
        changes = {"gradient_checkpointing": checkpointing}
        learnt = train(student, objective(kind, teacher, way), Samples(), replace(config, **changes), run, "stage")
        trained.append(learnt.state_dict())
    torch.testing.assert_close(trained[0], trained[1], rtol=0, atol=0)


@pytest.mark.slow
def test_compiled_student_and_teacher_have_one_graph_each_and_learn_alike(tmp_path, unet, monkeypatch):
    """No recompilation, whatever the timesteps, the coins of guidance and the captions that are dropped.

    The graphs are run by torch's eager backend: inductor takes minutes.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = TrainConfig(steps=5, batch_size=4, learning_rate=1e-3, warmup_steps=1)
    weights = {}
    for compiled in (False, True):
        AcceleratorState._reset_state(True)
        student, teacher = (PrunableUNet2DConditionModel.from_unet(unet) for _ in range(2))
        if compiled:
            teacher.compile(dynamic=False, backend="eager")
        learnt = objective(StepDistillation, teacher.requires_grad_(False), step_schedule(4, 8), guided_share=0.5)
        run = Run(tmp_path / str(compiled), Accelerator(cpu=True))
        torch._dynamo.utils.counters.clear()
        trained = train(student, learnt, Samples(), replace(config, compile=compiled), run, "stage")
        assert type(trained) is PrunableUNet2DConditionModel
        weights[compiled] = trained.state_dict()
    graphs = torch._dynamo.utils.counters
    assert graphs["stats"]["unique_graphs"] == 2 and not graphs["graph_break"] and not graphs["recompiles"]
    torch.testing.assert_close(weights[True], weights[False], rtol=1e-3, atol=1e-4)
