"""SDXL through every job, as it ships: two text encoders with tokenizers of their own, Euler's scheduler, a VAE that
wants float32, zeros for the empty prompt, sizes of the resolution that is trained at."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, StableDiffusionXLPipeline

from slimstep.data.shards import CachedPairs
from slimstep.eval.sampling import Sampler
from slimstep.models.pipeline import export_pipeline, load_pipeline, upcast_vae
from tests.jobs import run_job
from tests.tiny import tiny_sdxl_pipeline

SMALL = ["data.pairs.size=16", "eval.prompts=4", "eval.pictures=2", "eval.batch_size=4"]
TRAINED = ["train.steps=2", "train.batch_size=2", "train.gradient_checkpointing=true", "recovery.train.steps=2",
           "recovery.train.batch_size=2", "v_prediction.train.steps=2", "v_prediction.train.batch_size=2"]  # fmt: skip
STEPS = ["distillation.steps=[4,2]", "curves.steps=[2]", "curves.guidance=[2.5]"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory, tiny_clip_folder):
    """Overrides that put a random SDXL in the place of the bundled model."""
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_sdxl_pipeline().save_pretrained(folder)
    return ["model=path", f"model.name_or_path={folder}", f"scorer.model=local-dir:{tiny_clip_folder}",
            "scorer.force=true"]


def run(root, experiment, *overrides):
    job = [f"+experiment={experiment}", f"name={experiment}", f"root={root}", *SMALL, *overrides]
    done = run_job(*job)
    assert done.returncode in (0, 3), done.stderr
    return root / experiment


def drawn_by_stock(export, steps, **options):
    pipeline = StableDiffusionXLPipeline.from_pretrained(export, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", num_inference_steps=steps, output_type="pt", **options).images
    assert image.isfinite().all()
    return pipeline


def test_its_vae_stays_in_float32_beside_a_unet_in_float16(sdxl):
    """For those who ask it themselves; a pipeline that is called does it by itself, and wants it as it was."""
    pipeline = load_pipeline(sdxl[1].partition("=")[2], dtype="float16")
    image = pipeline("a cat", num_inference_steps=1, output_type="pt").images
    upcast_vae(pipeline)
    assert (pipeline.unet.dtype, pipeline.vae.dtype) == (torch.float16, torch.float32)
    sampler = Sampler(pipeline, steps=1, guidance_scale=5.0)
    assert sampler.images(pipeline.unet, ["a cat"], [0]).shape == image.shape


@pytest.mark.slow
def test_it_is_pruned_at_another_resolution_and_keeps_its_own_scheduler(tmp_path, sdxl):
    search = ["search.rounds=1", "search.target_fraction=0.9", "scoring.prompts=4", "scoring.steps=2", "eval.steps=2",
              "latency.iterations=3", "latency.additive_samples=2", "data.resolution=32"]  # fmt: skip
    path = run(tmp_path, "prune_unet", *sdxl, *TRAINED, *search)
    (folder,) = (tmp_path / "cache").iterdir()
    pairs, pipeline = CachedPairs(folder), load_pipeline(path / "export")
    pair, nothing = pairs[0], pairs.unconditional.tensors
    assert pair["time_ids"].tolist() == [32, 32, 0, 0, 32, 32] and pair["pooled"].any()
    assert nothing["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]
    assert not nothing["text"].any() and not nothing["pooled"].any()  # force_zeros_for_empty_prompt
    assert isinstance(pipeline.scheduler, EulerDiscreteScheduler) and pipeline.vae.config.force_upcast
    assert (pipeline.tokenizer.pad_token, pipeline.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    drawn_by_stock(path / "export", 2)


@pytest.mark.slow
def test_its_decoder_is_pruned(tmp_path, sdxl):
    latents = ["latents.count=4", "latents.prompts=4", "latents.steps=1", "latents.batch_size=4", "eval.steps=2",
               "decoder.batches=[1]", "decoder.samples=4", "latency.iterations=2", "latency.warmup=1",
               "decoder.importance=taylor", "latents.real_share=0.5"]  # fmt: skip
    path = run(tmp_path, "prune_vae", *sdxl, *TRAINED[:3], *latents)
    vae = drawn_by_stock(path / "export", 2).vae
    assert vae.config.force_upcast and vae.decoder.conv_in.out_channels == 4


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["steps", "guidance", "lcm"])
def test_an_epsilon_teacher_on_eulers_grid_is_distilled(tmp_path, sdxl, objective):
    """Is converted to v first, distilled on DDIM's trailing grid of the same noise schedule, and exported with that."""
    embedded = [f"objective={objective}", "distillation.guidance_embed_dim=32"]
    options = {"steps": ["distillation.recover=false"]}.get(objective, embedded)
    path = run(tmp_path, "distill_steps", *sdxl, *TRAINED, *STEPS, *options)
    student = drawn_by_stock(path / "steps-2/export", 2, guidance_scale=2.5)
    scheduler = student.scheduler
    assert isinstance(scheduler, LCMScheduler if objective == "lcm" else DDIMScheduler)
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.timestep_spacing == "trailing"
    torch.testing.assert_close(scheduler.alphas_cumprod, tiny_sdxl_pipeline().scheduler.alphas_cumprod)
    stages = {json.loads(line)["stage"] for line in (path / "metrics.jsonl").read_text().splitlines()}
    assert "velocity-teacher" in stages and "steps-2" in stages


@pytest.mark.slow
def test_a_pruned_student_of_it_is_repaired(tmp_path, sdxl):
    pipeline = load_pipeline(sdxl[1].partition("=")[2])
    pipeline.unet = pipeline.unet.with_architecture({"mid_block.attentions.0.transformer_blocks.2": 0})
    export_pipeline(pipeline, tmp_path / "student")
    path = run(tmp_path, "distill_steps", *sdxl, *TRAINED, *STEPS, f"distillation.student={tmp_path / 'student'}",
               "distillation.recover=true", "mixed_precision=bf16")  # fmt: skip
    assert load_pipeline(path / "steps-2/export").unet.architecture == pipeline.unet.architecture


@pytest.mark.slow
def test_it_is_evaluated_beside_a_pruned_one(tmp_path, sdxl):
    evaluated = ["data.resolution=16", "curves.steps=[1,2]", "curves.guidance=[1,3]", "evaluation.real_images=8"]
    path = run(tmp_path, "evaluate", *sdxl, *evaluated)
    points = json.loads((path / "evaluation.json").read_text())["points"]
    assert len(points) == 4 and {point["protocol"]["scheduler"] for point in points} == {"EulerDiscreteScheduler"}


@pytest.mark.slow
def test_it_is_timed(tmp_path, sdxl):
    rows = ["benchmark.dtype=[float32,float16]", "benchmark.compile=[eager]", "benchmark.batches=[1]", "eval.steps=2",
            "benchmark.images=2", "latency.iterations=2", "latency.warmup=1", "data.resolution=16"]  # fmt: skip
    path = run(tmp_path, "benchmark", *sdxl, *rows)
    rows = json.loads((path / "results.json").read_text())["rows"]
    assert len(rows) == 2 and not any(row["cannot"] for row in rows)
