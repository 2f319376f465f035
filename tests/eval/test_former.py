"""Runs and exports of earlier versions are read, drawn, continued and loaded (tests/fixtures/former).

Each is a job on the random model of tests/tiny.py, run before there was one layout of results and one import root.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from slimstep.configs.schema import Config
from slimstep.engine.checked import CONFIGS
from slimstep.engine.identity import existing_run
from slimstep.engine.renamed import with_new_key
from slimstep.engine.run import Run
from slimstep.eval.pages.comparison import compare_runs
from slimstep.eval.pages.evaluation_page import write_evaluation_report
from slimstep.eval.pages.results_page import compare_results
from slimstep.eval.pages.run_page import write_report
from slimstep.eval.pages.steps_page import write_steps_report
from slimstep.eval.pages.vae_page import write_vae_report
from slimstep.eval.record import read_evaluation
from slimstep.models.pipeline import load_pipeline
from slimstep.prune.latency import read_table
from tests.jobs import run_job
from tests.tiny import small_pipeline, write_tiny_clip

ROOT = Path(__file__).resolve().parents[2]
FORMER = ROOT / "tests/fixtures/former"
PAGES = {"prune_unet": write_report, "prune_vae": write_vae_report, "distill_steps": write_steps_report,
         "evaluate": write_evaluation_report}  # fmt: skip
SLIDERS = {"prune_unet": 1, "prune_vae": 2, "distill_steps": 1, "evaluate": 1}
# What the runs were made with, in the words of that version.
COMMON = [
    "root=runs", "threads=1", "model=path", "model.name_or_path=model", "data.resolution=16",
    "scorer.model=local-dir:scorer", "scorer.force=true", "data.pairs.size=16", "data.cache.folder=cache",
    "eval.prompts=4", "eval.pictures=2",
]  # fmt: skip
TRAINED = ["train.batch_size=4", "recovery.train.batch_size=4", "latency.warmup=1", "latency.iterations=2"]
WORDS = {
    "prune_unet": [
        "search.rounds=1", "search.target_fraction=0.9", "train.steps=3", "train.batch_size=4",
        "recovery.train.steps=3", "recovery.train.batch_size=4", "scoring.prompts=4", "scoring.steps=2",
        "scoring.batch_size=8", "eval.steps=2", "latency.iterations=3", "latency.additive_samples=2",
    ],
    "prune_vae": [
        "train.steps=6", "train.batch_size=4", "latents.count=8", "latents.prompts=4", "latents.steps=1",
        "latents.batch_size=4", "eval.steps=2", "decoder.batches=[1]", "decoder.samples=4", "latency.iterations=2",
        "latency.warmup=1",
    ],
    "distill_steps": [
        "train.steps=3", *TRAINED, "recovery.train.steps=2", "velocity.train.steps=2", "velocity.train.batch_size=4",
        "curves.steps=[1,2]", "curves.guidance=[2.5]", "ladder.steps=[4,2,1]",
        "ladder.rungs={steps-1: {train: {steps: 2}}}",
    ],
    "evaluate": [
        "models={teacher: model, student: runs/prune_unet/export}", "eval.batch_size=3", "curves.steps=[1,2]",
        "curves.guidance=[1,3]", "evaluation.real_images=8",
    ],
}  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """A copy of all runs, to be written into."""
    return shutil.copytree(FORMER, tmp_path / "runs")


def written(job: str) -> dict:
    """The results as the earlier version wrote them."""
    return json.loads((FORMER / job / ("results.json" if job == "evaluate" else "evaluation.json")).read_text())


def test_a_pruning_run_says_what_its_file_says():
    evaluation, models = read_evaluation(FORMER / "prune_unet"), written("prune_unet")["models"]
    assert [p.model for p in evaluation.points] == ["teacher", "round-00", "student"]
    assert evaluation.reference == {"model": "teacher", "steps": 2} and evaluation.n == 4
    for point, model in zip(evaluation.points, models, strict=True):
        assert point.key == (model["name"], 2, 2.5)
        assert point.clip["per_prompt"] == model["clip"]["per_prompt"]
        assert point.versus_reference == model["versus_teacher"]
        assert point.mean("psnr") == model["psnr_to_teacher"]
        assert evaluation.facts["ms"][point.model] == model["ms"]
        assert point.facts["parameters"]["UNet"] == model["parameters"] and point.facts["gflops"] == model["gflops"]


def test_a_decoder_run_says_what_its_file_says():
    evaluation, decoders = read_evaluation(FORMER / "prune_vae"), written("prune_vae")["decoders"]
    assert [p.model for p in evaluation.points] == ["teacher", "pruned", "student"]
    assert evaluation.facts["widths"] == {"teacher": [8, 8], "student": [4, 4]}
    for point, decoder in zip(evaluation.points, decoders, strict=True):
        near = decoder["nearness"]
        assert point.clip["per_prompt"] == decoder["clip"]["per_prompt"]
        assert point.versus_reference == decoder["versus_wide"]
        assert point.facts["parameters"]["decoder"] == decoder["parameters"]
        for prefix, kind in {"": "sampled_to_wide", "real_": "real_to_wide", "image_": "real_to_image"}.items():
            for name, own in (near[kind] or {}).items():
                assert point.metrics[f"{prefix}{name}"]["per_prompt"] == own["per_item"]
                assert point.mean(f"{prefix}{name}") == own["mean"]


def test_a_distillation_says_what_its_file_says():
    evaluation, points = read_evaluation(FORMER / "distill_steps"), written("distill_steps")["points"]
    assert evaluation.reference == {"model": "teacher", "steps": 4}
    for point, own in zip(evaluation.points, points, strict=True):
        assert point.key == (own["model"], own["steps"], own["guidance"])
        assert point.clip["mean"] == own["clip"]["mean"] and point.versus_reference == own["versus_teacher"]
        assert point.metrics["latent_error"]["per_prompt"] == own["latent_error_to_teacher"]["per_prompt"]
        assert point.mean("psnr") == own["psnr_to_teacher"]
        assert point.mean("features") == own["feature_cosine_to_teacher"]
        assert point.facts["evaluations"] == own["evaluations"]


def test_an_evaluation_says_what_its_file_says():
    evaluation, results = read_evaluation(FORMER / "evaluate"), written("evaluate")
    assert evaluation.models == results["models"] and evaluation.reference == results["reference"]
    assert evaluation.prompts_hash == results["prompts_hash"] and list(evaluation.shown) == results["shown"]
    for point, own in zip(evaluation.points, results["points"], strict=True):
        assert point.key == (own["model"], own["steps"], own["guidance"])
        assert point.clip["per_prompt"] == own["clip"]["per_prompt"]
        assert point.versus_reference == own["versus_reference"]
        assert point.metrics["fd"]["fd"] == own["distribution"]["fd"]
        near = own["to_reference"] or {"psnr": {"mean": None}, "features": {"mean": None}}
        assert (point.mean("psnr"), point.mean("features")) == (near["psnr"]["mean"], near["features"]["mean"])


@pytest.mark.parametrize("job", PAGES)
def test_the_page_of_a_run_is_drawn_anew(runs, job):
    page = PAGES[job](runs / job).read_text()
    for point in read_evaluation(runs / job).points:
        assert f"{point.clip['mean']:.2f}" in page
    assert page.count('class="split"') == SLIDERS[job], "two models' pictures of a prompt have a slider between them"


def test_runs_are_compared(runs, tmp_path):
    table = compare_runs([runs / "prune_unet"], tmp_path / "compared")
    assert "185.3 k" in table and (tmp_path / "compared/report.html").is_file()
    table = compare_results([runs / job for job in PAGES], tmp_path / "report")
    assert all(job in (tmp_path / "report/report.html").read_text() for job in PAGES), table


@pytest.mark.parametrize("job", WORDS)
def test_the_same_command_means_the_same_run(runs, job):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("train", [with_new_key(word) for word in (f"+experiment={job}", *COMMON, *WORDS[job])])
    config = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Config), composed), resolve=True)
    other = {**config, "seed": 1}
    (runs / job / "report.html").touch()
    assert existing_run(runs, job, "", config) == job and existing_run(runs, job, "", other) is None
    before = (runs / job / "config.yaml").read_bytes()
    run = Run(runs / job, Accelerator(cpu=True))
    run.keep_config(config, ignoring=())
    assert (runs / job / "config.yaml").read_bytes() == before and (runs / job / "report.html").exists()
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        run.keep_config(other, ignoring=())


def test_a_finished_evaluation_makes_nothing_anew(runs, tmp_path, monkeypatch):
    for folder in ("model", "runs/prune_unet/export"):
        small_pipeline().save_pretrained(tmp_path / folder)
    (tmp_path / "scorer").mkdir()
    write_tiny_clip(tmp_path / "scorer")
    write_evaluation_report(runs / "evaluate")
    before = {file: file.stat().st_mtime_ns for file in (runs / "evaluate").rglob("*")}
    monkeypatch.chdir(tmp_path)
    done = run_job("+experiment=evaluate", *COMMON, *WORDS["evaluate"])
    assert done.returncode == 0, done.stderr
    assert "nothing was made anew" in done.stderr
    assert {file: file.stat().st_mtime_ns for file in (runs / "evaluate").rglob("*")} == before


def test_an_export_is_loaded_and_draws_what_it_drew():
    drawn = np.asarray(Image.open(FORMER / "pruned.png")).astype(int)
    stock = DiffusionPipeline.from_pretrained(FORMER / "pruned", trust_remote_code=True)
    ours = load_pipeline(FORMER / "pruned")
    assert ours.unet.repeats("down_blocks.0.attentions.1") == 0 and ours.unet.repeats("mid_block.attentions.0") == 2
    for pipeline in (stock, ours):
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        image = pipeline("a cat", latents=noise, num_inference_steps=2, guidance_scale=2.5).images[0]
        assert np.abs(np.asarray(image).astype(int) - drawn).max() <= 2


def test_a_latency_table_is_read():
    table = read_table(FORMER / "prune_unet/round-00/latency.json")
    assert len(table["sites"]) == 38 and table["full_ms"] > 0
