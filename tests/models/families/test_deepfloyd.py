"""DeepFloyd IF: its blocks in the prunable UNet, exports, T5's states, sampling with a learned variance, training."""

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    IFPipeline,
    UNet2DConditionModel,
)

from scripts.random_deepfloyd import small_if_pipeline, small_if_unet
from slimstep.data.cache import cache_pairs
from slimstep.distill.prediction import Denoising
from slimstep.distill.recovery import Recovery
from slimstep.distill.steps import StepDistillation
from slimstep.distill.teaching import Draw, StepSchedule, teacher_target
from slimstep.engine.objective import STUDENT, as_objective
from slimstep.engine.seeding import generator
from slimstep.eval.sampling import Sampler
from slimstep.eval.variance import VarianceKept, recorder_of
from slimstep.models.conditioning import conditioning_of
from slimstep.models.cost import count_gflops
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.families.unet2d.stock import stock_config, to_stock
from slimstep.models.family import denoiser_of, family_of, with_variance
from slimstep.models.guidance import with_guidance_embedding
from slimstep.models.memory import training_need
from slimstep.models.noise_schedule import add_noise, ddim_step, pred_of, schedule_of
from slimstep.models.pipeline import check_pipeline, export_pipeline, load_pipeline, with_unet
from slimstep.models.schedulers import ThresholdedDDIM, reads_variance, swapped_scheduler
from slimstep.prune.stochastic_depth import StochasticDepth
from tests.models.families.test_ddpm import Pictures

MID = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
SECOND_STAGES = {"resnet_out_scale_factor": 2**0.5, "mid_block_scale_factor": 2**0.5, "resnet_skip_time_act": True,
                 "only_cross_attention": True}  # fmt: skip
PROMPTS = ["a red cat", "Two DOGS & a bird", ""]


def small_unet(**fields) -> PrunableUNet2DConditionModel:
    return PrunableUNet2DConditionModel.from_unet(small_if_unet(**fields))


@pytest.fixture(scope="module")
def unet() -> PrunableUNet2DConditionModel:
    return small_unet()


def run(unet, **options) -> torch.Tensor:
    """Both halves of the output, for three random samples."""
    denoiser = with_variance(denoiser_of(unet))
    inputs = denoiser.example(unet, 3, tokens=7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return denoiser(unet, *inputs, **options)


# ---- the network


def test_blocks_are_all_resnets_and_attentions_but_those_that_resample(unet):
    assert len(unet.blocks) == (2 + 2 * 4) + 3 + (2 * 6 + 3) and not unet.parents
    assert list(unet.kinds.values()).count("attention") == 4 + 1 + 6 and unet.levels.keys() == {"down_blocks.2"}
    calls = []
    handles = [unet.get_submodule(b).register_forward_hook(lambda *_, b=b: calls.append(b)) for b in unet.blocks]
    run(unet)
    assert tuple(calls) == unet.blocks
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("fields", [{}, SECOND_STAGES])
def test_open_masks_are_the_stock_unet(fields):
    unet = small_unet(**fields)
    mask_BN = torch.ones(3, len(unet.kept_blocks), dtype=torch.bool)
    assert run(unet).shape == (3, 6, 16, 16)
    assert torch.equal(run(unet, block_mask_BN=mask_BN), run(small_if_unet(**fields)))


@pytest.mark.parametrize("fields", [{}, SECOND_STAGES])
@pytest.mark.parametrize("rule", ["shortcut", "drop_skip"])
def test_a_closed_mask_is_the_pruned_unet_for_each_sample_alone(rule, fields):
    unet = PrunableUNet2DConditionModel.from_unet(small_if_unet(**fields), skip_rule=rule)
    mask_BN = torch.rand(3, len(unet.kept_blocks), generator=torch.Generator().manual_seed(2)) < 0.6
    masked = run(unet, block_mask_BN=mask_BN)
    for row, open_N in enumerate(mask_BN.tolist()):
        closed = [block for block, is_open in zip(unet.kept_blocks, open_N, strict=True) if not is_open]
        assert torch.equal(run(unet.with_architecture(dict.fromkeys(closed, 0)))[row], masked[row])


def test_a_fresh_copy_changes_nothing(unet):
    copied = unet.with_architecture({block: 2 for block in unet.copyable_blocks})
    assert torch.equal(run(copied), run(unet))
    assert {unet.kinds[block] for block in unet.copyable_blocks} == {"resnet", "attention"}


def test_blocks_that_no_weights_make_the_identity_are_not_copied():
    unet = small_unet(resnet_out_scale_factor=2**0.5)
    outside_mid = [block for block in unet.copyable_blocks if unet.kinds[block] == "resnet"]
    assert outside_mid == [MID[0], MID[2]]
    assert not [b for b in small_unet(mid_block_scale_factor=2**0.5).copyable_blocks if b in (MID[0], MID[2])]


def test_heads_of_its_attentions_stay_for_diffusers_takes_them_for_all_of_the_width(unet):
    assert {unet.kinds[block] for block in unet.width_units} == {"resnet"}
    narrow = unet.with_architecture({MID[0]: {"widths": {"channels": 0.5}}})
    with unet.with_narrower(MID[0], "channels", 0.5):
        torch.testing.assert_close(run(narrow), run(unet))


def test_a_mask_survives_gradient_checkpointing():
    unet = small_unet().train()
    denoiser = denoiser_of(unet)
    inputs = denoiser.example(unet, 2, tokens=7, generator=torch.Generator().manual_seed(1))
    mask_BN = torch.rand(2, len(unet.kept_blocks), generator=torch.Generator().manual_seed(3)) < 0.5
    grads = []
    for _ in range(2):
        unet.zero_grad()
        denoiser(unet, *inputs, block_mask_BN=mask_BN).square().mean().backward()
        grads.append([p.grad.clone() if p.grad is not None else None for p in unet.parameters()])
        unet.enable_gradient_checkpointing()
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_it_is_counted(unet):
    assert count_gflops(unet) > count_gflops(unet.with_architecture({MID[1]: 0})) > 0
    assert training_need(unet).step > 0


# ---- what a stock UNet can express


def layer(index: int, level: int) -> dict[str, int]:
    """One layer less on the way down and on the way up, attention included."""
    down, up = f"down_blocks.{level}", f"up_blocks.{2 - level}"
    return {f"{side}.{part}.{index}": 0 for side in (down, up) for part in ("resnets", "attentions")}


FITS = {
    "nothing": {},
    "one layer of every level": {k: v for level in range(3) for k, v in layer(1, level).items()},
    "one layer of one level": layer(1, 1),
    "the middle": dict.fromkeys(MID, 0),
    "all of the middle but a ResNet": dict.fromkeys(MID[1:], 0),
    "the inner level": {"down_blocks.2": 0},
    "attentions on the way up": {f"up_blocks.0.attentions.{i}": 0 for i in range(3)},
}
FITS_NOT = {
    "one attention of a level": ({"down_blocks.1.attentions.0": 0}, "while another of its level stays"),
    "the attention in the middle": ({MID[1]: 0}, "all stays, or one ResNet, or nothing"),
    "a copy": ({MID[0]: 2}, "is copied"),
}


def pruned(architecture, **fields) -> PrunableUNet2DConditionModel:
    known = {k: v for k, v in architecture.items() if k in small_unet().blocks or k == "down_blocks.2"}
    return PrunableUNet2DConditionModel.from_unet(small_if_unet(**fields), known, "drop_skip")


@pytest.mark.parametrize("name", FITS)
def test_the_stock_unet_has_the_pruned_ones_output(name):
    unet = pruned(FITS[name])
    equivalent = stock_config(unet)
    assert not equivalent.obstacles
    stock = to_stock(unet)
    assert type(stock) is UNet2DConditionModel and torch.equal(run(stock), run(unet))
    again = UNet2DConditionModel.from_config(json.loads(json.dumps(equivalent.config)))
    assert again.num_parameters() == stock.num_parameters() == unet.num_parameters()


@pytest.mark.parametrize("name", FITS_NOT)
def test_what_no_stock_unet_expresses_is_named(name):
    architecture, reason = FITS_NOT[name]
    equivalent = stock_config(pruned(architecture))
    assert equivalent.config is None and any(reason in obstacle for obstacle in equivalent.obstacles), equivalent


def test_a_resnet_alone_in_the_middle_has_its_activation_where_stock_ones_have_it():
    equivalent = stock_config(pruned(dict.fromkeys(MID[1:], 0), resnet_skip_time_act=True))
    assert len(equivalent.obstacles) == 2 and equivalent.obstacles[0].startswith(MID[1])


# ---- the pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("if")
    small_if_pipeline().save_pretrained(place)
    return str(place)


@pytest.fixture
def pipeline(folder) -> DiffusionPipeline:
    return load_pipeline(folder)


def test_a_folder_loads_around_a_prunable_unet(folder, pipeline):
    assert type(pipeline) is IFPipeline and type(pipeline.unet) is PrunableUNet2DConditionModel
    assert family_of(pipeline).NAME.startswith("DeepFloyd IF") and family_of(small_if_unet()) is family_of(pipeline)
    assert torch.equal(run(pipeline.unet), run(small_if_unet()))


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("unet/config.json", {"out_channels": 3}, "in_channels=3 and out_channels=3; only one of RGB images that pred"),
        ("model_index.json", {"text_encoder": [None, None]}, "names no text_encoder"),
        ("model_index.json", {"_class_name": "IFImg2ImgPipeline"}, "only one that takes nothing but"),
    ],
)
def test_what_is_no_first_stage_is_refused_by_name(tmp_path, part, changes, reason):
    small_if_pipeline().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / part).read_text())
    (tmp_path / part).write_text(json.dumps(fields | changes))
    with pytest.raises(ValueError, match=reason):
        check_pipeline(tmp_path)


def test_a_vae_has_no_place_in_it(folder):
    with pytest.raises(ValueError, match="model.vae=x has no place in a model of pixels"):
        load_pipeline(folder, vae="x")


@pytest.mark.parametrize(("architecture", "is_stock"), [(layer(1, 1), True), ({MID[1]: 0}, False)])
def test_an_export_loads_in_diffusers_and_here(pipeline, tmp_path, architecture, is_stock):
    known = {block: 0 for block in architecture if block in pipeline.unet.blocks}
    unet = PrunableUNet2DConditionModel.from_unet(pipeline.unet, known, "drop_skip")
    export = export_pipeline(student := with_unet(pipeline, unet), tmp_path / "export")
    assert export.is_stock is is_stock
    stock = DiffusionPipeline.from_pretrained(tmp_path / "export", trust_remote_code=not is_stock)
    assert type(stock) is IFPipeline and (type(stock.unet) is UNet2DConditionModel) is is_stock
    assert torch.equal(run(stock.unet), run(student.unet))
    assert torch.equal(run(load_pipeline(tmp_path / "export").unet), run(student.unet))
    assert stock("a cat", num_inference_steps=2).images[0].size == (16, 16)


def test_captions_are_encoded_as_the_pipeline_does(pipeline):
    family = family_of(pipeline)
    text, empty = pipeline.encode_prompt(PROMPTS, device="cpu", clean_caption=True)
    assert torch.equal(family.encode(pipeline, PROMPTS).tensors["text"], text)
    assert torch.equal(family.unconditional(pipeline).tensors["text"], empty[:1])
    assert text.shape[1] == family.tokens(pipeline) == 77


def test_a_cache_holds_pixels_and_text(pipeline, tmp_path):
    cached = cache_pairs(Pictures(), pipeline, tmp_path)
    assert cached[2].keys() == {"latents", "text", "index"}
    assert torch.equal(((cached[2]["latents"] + 1) * 127.5).round().to(torch.uint8), Pictures()[2]["image"])
    torch.testing.assert_close(cached[2]["text"], family_of(pipeline).encode(pipeline, ["c"]).tensors["text"][0])


# ---- sampling


def stock_images(pipeline: IFPipeline, guidance_scale: float, seed: int = 5) -> torch.Tensor:
    draws = [generator("sample", seed, i) for i in range(3)]
    made = pipeline(PROMPTS, 4, guidance_scale=guidance_scale, generator=draws, output_type="np").images
    return (torch.from_numpy(made) * 255).round().to(torch.uint8)


def our_images(pipeline: IFPipeline, guidance_scale: float, seed: int = 5) -> torch.Tensor:
    sampler = Sampler(pipeline, 4, guidance_scale, seed)
    # The stock pipeline goes on with the generators that made its first noise.
    draws = [generator("sample", seed, i) for i in range(3)]
    first = torch.stack([torch.randn(3, 16, 16, generator=draw) for draw in draws])
    assert torch.equal(first, torch.stack([sampler.noise(i) for i in range(3)]))
    latents = sampler.latents(pipeline.unet, sampler.encode(PROMPTS), first, generators=draws)
    return sampler.decode(latents).permute(0, 2, 3, 1)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", [None, "ddim", "dpmsolver++", "euler", "unipc"])
def test_sampling_is_the_stock_pipelines(scheduler, guidance_scale):
    pipeline = small_if_pipeline()
    if scheduler:
        pipeline.register_modules(scheduler=swapped_scheduler(pipeline.scheduler, scheduler))
    assert reads_variance(pipeline.scheduler) is (scheduler is None)
    assert torch.equal(our_images(pipeline, guidance_scale), stock_images(pipeline, guidance_scale))


def test_sampling_of_v_prediction_is_the_stock_pipelines():
    for kind in (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler):
        pipeline = small_if_pipeline(prediction_type="v_prediction")
        name = {DDIMScheduler: "ddim", DPMSolverMultistepScheduler: "dpmsolver++"}.get(kind)
        if name:
            pipeline.register_modules(scheduler=swapped_scheduler(pipeline.scheduler, name))
        assert type(pipeline.scheduler) is kind
        assert torch.equal(our_images(pipeline, 4.0), stock_images(pipeline, 4.0))


def test_the_predicted_variance_and_dynamic_thresholding_make_a_difference(pipeline):
    images = our_images(pipeline, 4.0)
    for changes in ({"variance_type": "fixed_small"}, {"thresholding": False}):
        other = small_if_pipeline(**changes)
        assert reads_variance(other.scheduler) is ("variance_type" not in changes)
        assert not torch.equal(our_images(other, 4.0), images)
        assert torch.equal(our_images(other, 4.0), stock_images(other, 4.0))


def test_another_scheduler_is_saved_so_that_the_stock_pipeline_leaves_the_variance(pipeline, tmp_path):
    pipeline.register_modules(scheduler=swapped_scheduler(pipeline.scheduler, "ddim"))
    export_pipeline(pipeline, tmp_path / "export")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "export")
    stock.set_progress_bar_config(disable=True)
    assert type(stock.scheduler) is DDIMScheduler and stock.scheduler.config.thresholding
    assert torch.equal(stock_images(stock, 4.0), our_images(pipeline, 4.0))


def test_a_masked_image_is_the_pruned_networks(pipeline):
    sampler, unet = Sampler(pipeline, steps=2, guidance_scale=3.0), pipeline.unet
    mask_BN = torch.ones(2, len(unet.kept_blocks), dtype=torch.bool)
    mask_BN[1, unet.blocks.index(MID[1])] = False
    whole, masked = sampler.images(unet, ["x"], [0, 0], mask_BN)
    pruned = sampler.images(unet.with_architecture({MID[1]: 0}), ["x"], [0, 0])[0]
    assert torch.equal(masked, pruned) and torch.equal(whole, sampler.images(unet, ["x"], [0, 0])[0])


def test_a_learned_variance_of_a_network_that_predicts_none_is_refused():
    from tests.tiny import small_pipeline

    latents = small_pipeline()
    scheduler = DDPMScheduler.from_config(latents.scheduler.config, variance_type="learned_range")
    with pytest.raises(ValueError, match="variance_type=learned_range, and a UNet2DConditionModel predicts no varian"):
        Sampler(latents, 2, 1.0, scheduler=scheduler)


# ---- training


def given(unet, prediction_type: str = "epsilon") -> dict:
    uncond = denoiser_of(unet).example(unet, 1, tokens=7, generator=torch.Generator().manual_seed(4))[2]
    return {"schedule": schedule_of(trailing(prediction_type)), "uncond": uncond, "teacher": small_unet()}


def batch(unet) -> dict:
    draw = torch.Generator().manual_seed(3)
    x_BCHW, _, cond = denoiser_of(unet).example(unet, 4, tokens=7, generator=draw)
    return {"latents": x_BCHW.clamp(-1, 1), "progress": 0.5, **cond.tensors}


def trailing(prediction_type: str, **fields) -> DDIMScheduler:
    return DDIMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing", **fields)


STEPS = StepSchedule(trailing("v_prediction"), 8, trailing("v_prediction"), 4)
OBJECTIVES = {
    "stochastic depth": lambda **options: StochasticDepth(**options, skip_prob={"resnet": 0.2, "attention": 0.2}),
    "denoising": lambda **options: Denoising(**options),
    "recovery": lambda **options: Recovery(**options),
    "steps": lambda **options: StepDistillation(**options, step_schedule=STEPS, guided_share=0.5),
}  # fmt: skip


def loss_of(name: str, unet, keeps: bool = True) -> tuple[torch.Tensor, dict]:
    prediction_type = "v_prediction" if name == "steps" else "epsilon"
    options, recorder = given(unet, prediction_type), recorder_of(unet, prediction_type)
    objective = as_objective(OBJECTIVES[name](**options, denoiser=recorder))
    objective = VarianceKept(objective, recorder, options["teacher"]) if keeps else objective
    return objective.loss({STUDENT: unet}, batch(unet), torch.Generator().manual_seed(0), STUDENT)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_training_step_moves_every_block_and_the_predicted_variance(name):
    unet = small_unet().train()
    with torch.no_grad():
        unet.conv_out.weight += 0.1
    loss, metrics = loss_of(name, unet)
    assert loss.isfinite() and loss > 0 and all(value.isfinite() for value in metrics.values())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())
    assert metrics["variance"] > 0 and unet.conv_out.weight.grad[3:].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_sees_the_first_half_and_the_variance_is_added_to_it(name):
    """The network is another one in the variance alone; its loss is that of the objective and the variance's error."""
    unet = small_unet()
    with torch.no_grad():
        unet.conv_out.bias[3:] += 0.5
    loss, metrics = loss_of(name, unet)
    plain, _ = loss_of(name, unet, keeps=False)
    torch.testing.assert_close(loss - metrics["variance"], plain)
    if name != "stochastic depth":  # whose student lacks blocks
        torch.testing.assert_close(metrics["variance"], torch.tensor(0.25))
        _, same = loss_of(name, small_unet())
        assert same["variance"] == 0
    plain.backward()
    assert not unet.conv_out.weight.grad[3:].any()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_student_lands_where_the_teachers_thresholded_steps_land(unet, prediction_type):
    limits = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    scheduler, denoiser = trailing(prediction_type, **limits), denoiser_of(unet, prediction_type)
    steps = StepSchedule(scheduler, 8, trailing(prediction_type), 4)
    schedule, cond, draw = schedule_of(scheduler), batch(unet), torch.Generator().manual_seed(1)
    x0, noise = (2 * torch.randn(4, 3, 16, 16, generator=draw) for _ in range(2))
    times_BK = steps.bounds(schedule)[2].expand(4, -1)
    start, end = (schedule.alpha_sigma(times_BK[:, k]) for k in (0, -1))
    z = add_noise(x0, noise, start)
    given = Draw(x0, noise, z, times_BK, conditioning_of(cond, like=denoiser.example(unet, 1)[2]))
    target = teacher_target(denoiser, unet, schedule, given, given.cond, torch.zeros(0), steps.limit)
    landed = ddim_step(pred_of(target.x0_BCHW, z, start, prediction_type), z, start, end, prediction_type)
    scheduler.set_timesteps(8)
    expected, unlimited = z, teacher_target(denoiser, unet, schedule, given, given.cond, torch.zeros(0))
    for t in scheduler.timesteps[4:6]:
        with torch.no_grad():
            pred = denoiser(unet, expected, t, given.cond)
            expected = scheduler.step(pred, t, expected, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(landed, expected, rtol=1e-3, atol=1e-3)
    assert (target.x0_BCHW - unlimited.x0_BCHW).abs().max() > 0.1


def test_the_teachers_thresholded_steps_end_at_what_is_asked_for():
    """By the exact network for pixels of −1 and 1, guided; diffusers' own steps end at the picture's negative."""
    draw, found = torch.Generator().manual_seed(0), {}
    asked, start = torch.randn(1, 3, 32, 32, generator=draw).sign(), torch.randn(1, 3, 32, 32, generator=draw)
    for kind in (ThresholdedDDIM, DDIMScheduler):
        scheduler = kind(beta_schedule="squaredcos_cap_v2", thresholding=True, timestep_spacing="trailing")
        scheduler.set_timesteps(16)
        sample = start
        for t in scheduler.timesteps:
            alpha, sigma = schedule_of(scheduler).alpha_sigma(t.view(1))
            x0, guide = (torch.tanh(sample * alpha / sigma**2 + belief) for belief in (0, asked))
            guided = (sample - alpha * (x0 + 4 * (guide - x0))) / sigma
            sample = scheduler.step(guided, t, sample).prev_sample
        found[kind] = float((sample.sign() == asked).float().mean())
    assert found[ThresholdedDDIM] > 0.95 and found[DDIMScheduler] < 0.1


def test_a_network_that_predicts_no_variance_has_nothing_to_keep():
    from tests.tiny import small_unet as latents_unet

    assert recorder_of(latents_unet(), "epsilon") is None


def test_a_guidance_embedding_is_refused_for_its_pipelines_give_none(unet):
    with pytest.raises(ValueError, match="guidance_embed_dim=8, but DeepFloyd IF.* gives its UNet no guidance scale"):
        with_guidance_embedding(unet, 8)
