"""SDXL's two text states, pooled state and sizes travel as one tensor, and reach the UNet as diffusers brings them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.encoding import encode_captions, encode_nothing
from eval.sampling import Sampler
from models.conditioning import text_states
from models.pipeline import load_pipeline
from models.unet import PrunableUNet2DConditionModel, apart
from tests.tiny import WIDTH, tiny_pipeline, tiny_sdxl_pipeline

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a cat", "two dogs and a cow"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_sdxl_pipeline("v_prediction").save_pretrained(folder)
    return load_pipeline(folder)


def test_what_was_put_together_comes_apart(sdxl):
    with torch.no_grad():
        together = text_states(sdxl, PROMPTS, "cpu")
        states, _, pooled, _ = sdxl.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert together.shape == (2, 16 + 1, 2 * WIDTH)
    text, added = apart(sdxl.unet, together)
    assert torch.equal(text, states) and torch.equal(added["text_embeds"], pooled)
    assert added["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_our_images_are_those_of_the_stock_pipeline(sdxl, guidance_scale):
    sampler = Sampler(sdxl, 3, guidance_scale)
    noise = torch.stack([sampler.noise(i) for i in range(2)])
    ours = sampler.latents(sdxl.unet, sampler.encode(PROMPTS), noise)
    stock = tiny_sdxl_pipeline("v_prediction")
    theirs = stock(PROMPTS, latents=noise, num_inference_steps=3, guidance_scale=guidance_scale, height=16, width=16,
                   output_type="latent").images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_guidance_steers_away_from_what_the_pipeline_says(sdxl):
    with torch.no_grad():
        nothing = encode_nothing(sdxl, "cpu")["text"]
        assert encode_captions(sdxl, PROMPTS, "cpu")["text"].shape[1:] == nothing.shape[1:]
    text, added = apart(sdxl.unet, nothing)
    assert not text.any() and not added["text_embeds"].any()  # force_zeros_for_empty_prompt


def test_conditions_given_apart_are_left_alone(sdxl):
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 500])
    with torch.no_grad():
        together = text_states(sdxl, PROMPTS, "cpu")
        text, added = apart(sdxl.unet, together)
        assert torch.equal(sdxl.unet(z, t, together).sample, sdxl.unet(z, t, text, added_cond_kwargs=added).sample)


def test_one_text_encoder_has_no_further_rows():
    pipeline = tiny_pipeline()
    unet = PrunableUNet2DConditionModel.from_unet(pipeline.unet)
    with torch.no_grad():
        assert text_states(pipeline, PROMPTS, "cpu").shape == (2, 16, WIDTH)
        text = torch.randn(2, 5, WIDTH)
        z, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 500])
        assert torch.equal(unet(z, t, text).sample, pipeline.unet(z, t, text).sample)


JOBS = {
    "prune_unet": ["search.rounds=1", "search.target_fraction=0.9", "scoring.prompts=4", "scoring.steps=2",
                   "latency.iterations=3", "latency.additive_samples=2", "eval.steps=2"],
    "distill_steps": ["ladder.steps=[4,2]", "curves.steps=[2]", "curves.guidance=[2.5]", "objective.guided_share=0.5"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_jobs_run_on_sdxl(tmp_path, tiny_clip_folder, job):
    tiny_sdxl_pipeline("v_prediction").save_pretrained(tmp_path / "sdxl")
    small = [
        f"+experiment={job}", "model=path", f"model.name_or_path={tmp_path / 'sdxl'}", "data.resolution=16",
        "data.pairs.size=16", f"scorer.model=local-dir:{tiny_clip_folder}", "train.steps=3", "train.batch_size=4",
        "train.gradient_checkpointing=true", "recovery.train.steps=2", "recovery.train.batch_size=4",
        "eval.prompts=4", "eval.pictures=2", f"root={tmp_path}",
    ]  # fmt: skip
    command = [sys.executable, str(ROOT / "train.py"), *small, *JOBS[job]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 3), done.stderr
    run = tmp_path / job
    export = run / "export" if job == "prune_unet" else run / "steps-2/export"
    assert json.loads((export / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"
    assert json.loads((run / "evaluation.json").read_text())["environment"]
