"""Playground v2.5's kind, SDXL's network with EDM's preconditioning, through the jobs that train it."""

import json

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler, StableDiffusionXLPipeline

from slimstep.models.pipeline import load_pipeline
from tests.jobs import run_job
from tests.test_sdxl import SMALL, STEPS, TRAINED, run
from tests.tiny import tiny_edm_pipeline


@pytest.fixture(scope="module")
def playground(tmp_path_factory, tiny_clip_folder):
    """Overrides that put a random network of its kind in the place of the bundled model."""
    folder = tmp_path_factory.mktemp("playground")
    tiny_edm_pipeline(EDMDPMSolverMultistepScheduler()).save_pretrained(folder)
    return ["model=path", f"model.name_or_path={folder}", f"scorer.model=local-dir:{tiny_clip_folder}",
            "scorer.force=true"]  # fmt: skip


def drawn_by_stock(export, steps):
    pipeline = StableDiffusionXLPipeline.from_pretrained(export, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", num_inference_steps=steps, output_type="pt", height=16, width=16).images
    assert image.isfinite().all()
    return pipeline


@pytest.mark.slow
def test_it_is_pruned_and_keeps_its_own_scheduler(tmp_path, playground):
    search = ["search.rounds=1", "search.target_fraction=0.9", "scoring.prompts=4", "scoring.steps=2", "eval.steps=2",
              "latency.iterations=3", "latency.additive_samples=2", "data.resolution=16"]  # fmt: skip
    path = run(tmp_path, "prune_unet", *playground, *TRAINED, *search)
    pipeline = drawn_by_stock(path / "export", 2)
    assert isinstance(pipeline.scheduler, EDMDPMSolverMultistepScheduler)
    assert load_pipeline(path / "export").unet.architecture


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["steps", "guidance", "dmd"])
def test_it_is_distilled_on_eulers_steps_without_a_conversion(tmp_path, playground, objective):
    options = {
        "steps": [], "guidance": ["distillation.guidance_embed_dim=32"],
        "dmd": ["objective.guidance_scale=2.5", "distillation.mode=direct"],
    }[objective]  # fmt: skip
    options = [f"objective={objective}", *options, "distillation.recover=false", "data.resolution=16"]
    path = run(tmp_path, "distill_steps", *playground, *TRAINED, *STEPS, *options)
    scheduler = drawn_by_stock(path / "steps-2/export", 2).scheduler
    assert isinstance(scheduler, EDMEulerScheduler) and scheduler.config.prediction_type == "epsilon"
    scheduler.set_timesteps(2)
    halfway = (80 ** (1 / 7) / 2 + 0.002 ** (1 / 7) / 2) ** 7
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([80, halfway, 0]), rtol=1e-4, atol=0)
    stages = {json.loads(line)["stage"] for line in (path / "metrics.jsonl").read_text().splitlines()}
    assert "steps-2" in stages and "velocity-teacher" not in stages


def test_what_needs_betas_is_refused_before_anything_is_trained(tmp_path, playground):
    place = ["name=refused", f"root={tmp_path}", *SMALL, *playground, *TRAINED, *STEPS, "data.resolution=16"]
    for options, message in {
        ("objective=lcm", "distillation.guidance_embed_dim=32"): "needs LCMScheduler, which neither flows nor EDM",
        ("distillation.shift=3",): "distillation.shift=3 is for flow matching",
        ("distillation.sampler=LCMScheduler",): "leave with its EDMEulerScheduler",
    }.items():
        done = run_job("+experiment=distill_steps", *place, *options)
        assert done.returncode == 1 and message in done.stderr, done.stderr
