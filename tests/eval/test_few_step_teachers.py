"""Teachers of few steps (SDXL-Turbo, LCM, Lightning, Hyper-SD): sampled as their stock pipelines sample, without
guidance, and trained at their own timesteps alone. All networks are random; only the schedulers are the models' own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from omegaconf import OmegaConf

from slimstep.distill.config import DistillationConfig
from slimstep.distill.network import distillation_of
from slimstep.distill.recovery import Recovery
from slimstep.eval.config import SamplingConfig
from slimstep.eval.inputs import Teacher
from slimstep.eval.sampling import Sampler
from slimstep.eval.training import objective_of
from slimstep.models.card import Origin
from slimstep.models.denoiser import guidance_embedding
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.family import denoiser_of, family_of, schedule_for
from slimstep.models.guidance import with_guidance_embedding
from slimstep.models.networks import trained_steps_of, with_trained_steps, with_unet
from slimstep.models.noise_schedule import RectifiedFlow, trained_at_steps
from slimstep.models.pipeline import export_pipeline, load_pipeline
from slimstep.prune.job import at_its_guidance
from tests.jobs import run_job
from tests.tiny import WIDTH, slow, small_pipeline, tiny_sdxl_pipeline

PROMPTS = ("a red circle", "a blue square", "two stars")
TRAILING = {"timestep_spacing": "trailing"}
OWN = {
    "turbo": (EulerAncestralDiscreteScheduler, TRAILING),
    "lcm": (LCMScheduler, {}),
    "lightning": (EulerDiscreteScheduler, TRAILING),
    "hyper": (DDIMScheduler, TRAILING),
    "hyper, one LoRA for all": (TCDScheduler, {}),
}


def few_step(name: str, pipeline=None, steps: int | None = None):
    """A random pipeline with the scheduler of a few-step model, distilled to so many steps."""
    pipeline, (kind, fields) = pipeline or small_pipeline("epsilon"), OWN[name]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **fields)
    return with_trained_steps(pipeline, steps)


def drawn_by_stock(pipeline, sampler: Sampler) -> torch.Tensor:
    indices = range(len(PROMPTS))
    images = pipeline(
        prompt=list(PROMPTS), latents=torch.stack([sampler.noise(i) for i in indices]),
        num_inference_steps=sampler.steps, guidance_scale=sampler.guidance_scale, generator=sampler.generators(indices),
    ).images  # fmt: skip
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)


# ---- sampling


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
@pytest.mark.parametrize("name", OWN)
def test_each_draws_as_its_stock_pipeline_without_guidance(name, guidance_scale, steps):
    pipeline, asked = few_step(name), []
    sampler = Sampler(pipeline, steps, guidance_scale)
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: asked.append(len(inputs[0])))
    images = sampler.images(pipeline.unet, PROMPTS, range(3))
    assert asked == [3] * steps and sampler.evaluations(pipeline.unet) == steps, "one evaluation a step"
    assert images.float().std() > 5 and torch.equal(images, drawn_by_stock(pipeline, sampler))


@pytest.mark.parametrize("name", slow("turbo", "lcm", "lightning", "hyper"))
def test_each_sdxl_draws_as_its_stock_pipeline(name):
    pipeline = few_step(name, tiny_sdxl_pipeline())
    sampler = Sampler(pipeline, steps=2, guidance_scale=0.0)
    assert torch.equal(sampler.images(pipeline.unet, PROMPTS, range(3)), drawn_by_stock(pipeline, sampler))


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 8.0])
def test_an_lcm_that_takes_its_guidance_draws_as_its_stock_pipeline(guidance_scale):
    pipeline = few_step("lcm")
    torch.manual_seed(1)
    pipeline.unet = with_guidance_embedding(pipeline.unet, 32)
    torch.nn.init.normal_(pipeline.unet.time_embedding.cond_proj.weight)
    sampler = Sampler(pipeline, steps=2, guidance_scale=guidance_scale)
    assert torch.equal(sampler.images(pipeline.unet, PROMPTS, range(3)), drawn_by_stock(pipeline, sampler))
    assert sampler.evaluations(pipeline.unet) == 2


# ---- the timesteps that are trained at


@pytest.mark.parametrize("name", OWN)
def test_the_times_that_are_trained_at_are_those_at_which_its_steps_start(name):
    pipeline = few_step(name, steps=4)
    times = schedule_for(pipeline).sample_times(400, torch.Generator().manual_seed(0))
    pipeline.scheduler.set_timesteps(4)
    drawn, counts = times.unique(return_counts=True)
    assert sorted(drawn.tolist()) == sorted(pipeline.scheduler.timesteps.long().tolist())
    assert counts.min() > 60 and counts.max() < 140, "100 each, but for chance"


def test_a_model_that_was_not_distilled_is_trained_at_all_timesteps():
    times = schedule_for(few_step("turbo")).sample_times(400, torch.Generator().manual_seed(0))
    assert len(times.unique()) > 200


def test_a_flow_of_few_steps_is_trained_at_their_starts():
    from scripts.random_transformers import small_flux_pipeline  # FLUX.1-schnell is one

    pipeline = small_flux_pipeline()
    schedule = schedule_for(pipeline)
    few = trained_at_steps(schedule, pipeline.scheduler, 4)
    times = few.sample_times(200, torch.Generator().manual_seed(0))
    assert isinstance(few, RectifiedFlow)
    assert torch.equal(times.unique().flip(0), schedule.grid(pipeline.scheduler, 4)[:, 0])


def test_recovery_asks_teacher_and_student_at_these_timesteps_alone_and_learns_nothing_of_the_data():
    pipeline, asked = few_step("turbo", steps=4), set()
    teacher = PrunableUNet2DConditionModel.from_unet(pipeline.unet).requires_grad_(False)
    teacher.register_forward_pre_hook(lambda module, inputs: asked.update(inputs[1].tolist()))
    uncond = family_of(teacher).unconditional(pipeline)
    draw = torch.Generator().manual_seed(0)
    text = torch.randn(8, uncond.tensors["text"].shape[1], WIDTH, generator=draw)
    batch = {"latents": torch.randn(8, 4, 8, 8, generator=draw), "text": text}
    recovery = Recovery(
        denoiser_of(teacher, "epsilon"), schedule_for(pipeline), uncond, teacher, caption_dropout=0.0,
        denoising_weight=0.0,
    )  # fmt: skip
    loss, metrics = recovery(teacher, batch, draw)
    assert loss == 0 and metrics["denoising"] > 0
    assert len(asked) > 1 and asked <= {999, 749, 499, 249}


# ---- jobs


def run_on_cpu() -> SimpleNamespace:
    return SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")))


def sampler_of(pipeline, steps: int) -> Sampler:
    config = OmegaConf.create({"model": {"name_or_path": "maker/turbo"}, "sampling": {"precision": "float32"}})
    return Teacher(pipeline, config, run_on_cpu()).sampler(SamplingConfig(steps=steps, guidance_scale=0.0))


def test_a_job_does_not_sample_at_timesteps_that_its_teacher_never_learnt():
    turbo = few_step("turbo", steps=4)
    assert [sampler_of(turbo, steps).steps for steps in (1, 2, 4)] == [1, 2, 4]
    for steps in (3, 8):
        with pytest.raises(ValueError, match=rf"{steps} steps are not among .*maker/turbo was .*trained_steps=4: set"):
            sampler_of(turbo, steps)
    assert sampler_of(few_step("turbo"), 8).steps == 8
    assert sampler_of(few_step("lcm", steps=50), 4).steps == 4, "an LCM learnt 50 timesteps, and is sampled at 4"


def test_a_student_remembers_the_steps_that_its_teacher_was_distilled_to(tmp_path):
    few_step("turbo").save_pretrained(tmp_path / "teacher")
    teacher = load_pipeline(tmp_path / "teacher", trained_steps=4)
    student = with_unet(teacher, teacher.unet.with_architecture({"mid_block.attentions.0": 0}))
    assert trained_steps_of(student) == 4
    export_pipeline(student, tmp_path / "export", origin=Origin("maker/turbo", 4, 0.0, trained_steps=4))
    loaded = load_pipeline(tmp_path / "export")
    assert isinstance(loaded.scheduler, EulerAncestralDiscreteScheduler)
    assert schedule_for(loaded).trained_N.tolist() == [999, 749, 499, 249]
    assert "num_inference_steps=4, guidance_scale=0)" in (tmp_path / "export/README.md").read_text()
    with pytest.raises(ValueError, match="trained_steps=2000 must be between 1 and the scheduler's 1000"):
        load_pipeline(tmp_path / "teacher", trained_steps=2000)


def test_a_lora_of_few_steps_gives_its_model_another_scheduler_and_spacing(tmp_path):
    """As Lightning's and Hyper-SD's pages say it, on SDXL, whose own file says Euler with leading steps."""
    tiny_sdxl_pipeline().save_pretrained(tmp_path)
    own = load_pipeline(tmp_path).scheduler
    for scheduler, kind in (("euler", EulerDiscreteScheduler), ("ddim", DDIMScheduler)):
        loaded = load_pipeline(tmp_path, scheduler=scheduler, timestep_spacing="trailing", trained_steps=4)
        assert schedule_for(loaded).trained_N.tolist() == [999, 749, 499, 249]
        stock = kind.from_config(own.config, timestep_spacing="trailing")
        assert type(loaded.scheduler) is kind and loaded.scheduler.config.timestep_spacing == "trailing"
        for made in (stock, loaded.scheduler):
            made.set_timesteps(4)
        assert torch.equal(stock.timesteps, loaded.scheduler.timesteps)
        assert torch.equal(stock.alphas_cumprod, loaded.scheduler.alphas_cumprod)
    assert load_pipeline(tmp_path).scheduler.config.timestep_spacing == "leading"
    for scheduler, spacing, message in (
        ("lcm", "leading", "model.timestep_spacing=leading: LCMScheduler spaces its timesteps trailing, always"),
        ("euler", "trail", "model.timestep_spacing=trail is unknown; choose from leading, linspace, trailing"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pipeline(tmp_path, scheduler=scheduler, timestep_spacing=spacing)


OBJECTIVES = {"steps": "steps.StepDistillation", "dmd": "dmd.DistributionMatching"}


@pytest.mark.parametrize(
    ("name", "prediction_type", "objective", "steps", "message"),
    [
        ("turbo", "epsilon", "steps", [4, 2], "it predicts ε: the conversion to v-prediction would train it on means"),
        ("hyper", "v_prediction", "dmd", [4, 1], "objective DistributionMatching asks a teacher at all timesteps"),
        ("hyper", "v_prediction", "steps", [8, 4], r"asks it at \[999, 874, .* learnt \[999, 749, 499, 249\]"),
        ("lcm", "v_prediction", "steps", [4, 2], r"asks it at \[999, 749, .* where it learnt \[999, 759, 499, 259\]"),
        ("hyper", "v_prediction", "steps", [4, 2, 1], None),
    ],
)  # fmt: skip
def test_a_teacher_of_few_steps_is_distilled_to_fewer_of_its_own_or_refused_by_name(
    name, prediction_type, objective, steps, message
):
    pipeline = few_step(name, small_pipeline(prediction_type), 4)
    pipeline.unet = PrunableUNet2DConditionModel.from_unet(pipeline.unet)
    config = OmegaConf.structured(DistillationConfig(steps=steps))
    model = {"name_or_path": "maker/turbo"}
    described = {"model": model, "objective": {"_target_": f"slimstep.distill.{OBJECTIVES[objective]}"}}
    teacher = Teacher(pipeline, OmegaConf.create({**described, "distillation": config}), run_on_cpu())
    if message is None:
        schedule = distillation_of(teacher).schedule
        assert schedule.trained_N.tolist() == [999, 749, 499, 249]
        return
    with pytest.raises(ValueError, match=rf"maker/turbo was distilled to 4 steps .*, and .*{message}.*; prune it as"):
        distillation_of(teacher)


def test_an_lcm_that_takes_its_guidance_is_pruned_at_the_scale_that_it_is_evaluated_with():
    pipeline, given = few_step("lcm", steps=4), []
    network = with_guidance_embedding(PrunableUNet2DConditionModel.from_unet(pipeline.unet), 32).requires_grad_(False)
    network.register_forward_pre_hook(lambda m, inputs, kwargs: given.append(kwargs["timestep_cond"]), with_kwargs=True)
    pipeline = with_unet(pipeline, network)
    teacher = Teacher(pipeline, OmegaConf.create({"eval": {"guidance_scale": 8.0}}), run_on_cpu())
    draw, uncond = torch.Generator().manual_seed(0), family_of(network).unconditional(pipeline)
    batch = {"latents": torch.randn(2, 4, 8, 8, generator=draw), "text": uncond.tensors["text"].expand(2, -1, -1)}
    description = {"_target_": "slimstep.distill.recovery.Recovery"}
    objective = objective_of(description, teacher, network, uncond, **at_its_guidance(teacher))
    objective(network, {**batch, "progress": 1.0}, draw)
    assert len(given) == 2, "teacher and student"
    for embedding in given:
        torch.testing.assert_close(embedding, guidance_embedding(torch.tensor([8.0, 8.0]), 32))
    assert at_its_guidance(Teacher(few_step("lcm"), teacher.config, run_on_cpu())) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "guidance_scale"), [("turbo", 0.0), ("lcm", 8.0)])
def test_a_pruned_one_draws_in_stock_diffusers_what_it_draws_here(tmp_path, tiny_clip_folder, name, guidance_scale):
    pipeline = few_step(name, tiny_sdxl_pipeline())
    if guidance_scale:
        torch.manual_seed(1)
        pipeline.unet = with_guidance_embedding(pipeline.unet, 32)
        torch.nn.init.normal_(pipeline.unet.time_embedding.cond_proj.weight)
    pipeline.save_pretrained(tmp_path / "teacher")
    done = run_job(
        "+experiment=prune_few_step", f"model.name_or_path={tmp_path}/teacher", f"root={tmp_path}", "name=pruned",
        f"eval.guidance_scale={guidance_scale}", f"scoring.guidance_scale={guidance_scale}",
        f"scorer.model=local-dir:{tiny_clip_folder}", "scorer.force=true", "data.pairs.size=16", "eval.prompts=4",
        "eval.pictures=2", "eval.batch_size=4", "train.steps=2", "train.batch_size=2", "recovery.train.steps=2",
        "recovery.train.batch_size=2", "search.rounds=1", "search.target_fraction=0.9", "scoring.prompts=4",
        "latency.iterations=3", "latency.additive_samples=2",
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "pruned/export", trust_remote_code=True)
    stock.set_progress_bar_config(disable=True)
    ours = load_pipeline(tmp_path / "pruned/export")
    assert isinstance(stock.scheduler, OWN[name][0]) and trained_steps_of(ours) == 4
    sampler = Sampler(ours, steps=4, guidance_scale=guidance_scale)
    assert torch.equal(sampler.images(ours.unet, PROMPTS, range(3)), drawn_by_stock(stock, sampler))
