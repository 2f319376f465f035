"""The whole method in one command on a random model: what it leaves, that it goes on, and that it runs on two ranks."""

import json
import os
import subprocess
import sys

import pytest
from diffusers import DiffusionPipeline

from slimstep import ROOT
from slimstep.models.vae import NarrowAutoencoderKL
from tests.jobs import run_job
from tests.test_processes import LAUNCHERS

SMALL = [
    "+experiment=snapfusion", "data.pairs.size=16", "train.steps=3", "train.batch_size=4", "recovery.train.steps=3",
    "recovery.train.batch_size=4", "scoring.prompts=4", "scoring.steps=2", "scoring.batch_size=8", "eval.prompts=4",
    "eval.pictures=2", "latency.iterations=3", "latency.additive_samples=2", "latents.count=8", "latents.prompts=4",
    "latents.steps=2", "search.rounds=1", "benchmark.images=2", "curves.steps=[2]",
    "stages.distill_steps.distillation.steps=[4,2,1]", "stages.evaluate.models.teacher.steps=[3,1]",
    "stages.benchmark.models.teacher.steps=[3,1]",
]  # fmt: skip


def run(root, *overrides, small=SMALL):
    return run_job(*small, f"root={root}", *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("runs")
    done = run(root, *tiny_model)
    assert done.returncode in (0, 3), done.stderr
    return root / "snapfusion", done


@pytest.mark.slow
def test_the_student_has_a_slim_unet_a_narrow_decoder_and_few_steps(finished):
    path, _ = finished
    student = DiffusionPipeline.from_pretrained(path / "export", trust_remote_code=True)
    assert type(student.vae).__name__ == NarrowAutoencoderKL.__name__ and student.vae.is_pruned
    trained = DiffusionPipeline.from_pretrained(path / "distill_steps/steps-1/export", trust_remote_code=True)
    assert student.scheduler.config == trained.scheduler.config
    assert student("a red circle", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_the_last_page_has_every_product_and_the_student_against_the_teacher(finished):
    path, done = finished
    summary = json.loads((path / "report/summary.json").read_text())
    assert [row["steps"] for row in summary["against"]] == [3, 1] and summary["student"]["steps"] == 1
    assert all(row["speedup"]["ratio"] > 0 and row["difference"]["n"] > 1 for row in summary["against"])
    table = (path / "report/table.md").read_text()
    for name in ("teacher", "evolved", "repaired", "narrow_decoder", "distilled", "student"):
        assert f"| {name} " in table, name
    assert json.loads(done.stdout.splitlines()[-1])["student"] == summary["student"]
    page = (path / "report/report.html").read_text()
    assert "../prune_unet/report.html" in page and "+experiment=distill_steps" in page


@pytest.mark.slow
def test_the_student_is_evaluated_on_no_calibration_prompt(finished):
    path, _ = finished
    calibration = json.loads((path / "prune_unet/prompts.json").read_text())["calibration_prompts"]
    shown = json.loads((path / "evaluate/evaluation.json").read_text())["shown"]
    assert len(calibration) == 4 and len(shown) == 2 and not set(calibration) & set(shown)


@pytest.mark.slow
def test_a_finished_method_makes_nothing_anew(finished, tiny_model):
    path, first = finished
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    again = run(path.parent, *tiny_model)
    assert again.returncode == first.returncode, again.stderr
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_every_stage_can_be_planned_on_a_folder_of_photographs(tmp_path, tiny_model, photo_folder):
    small = [word for word in SMALL if not word.startswith("data.")]
    planned = run(tmp_path, *tiny_model, "data=imagefolder", f"data.root={photo_folder}", "plan=true", small=small)
    assert planned.returncode == 0, planned.stderr
    assert "## report" in planned.stdout and "all stages: about" in planned.stdout.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == []  # nothing is written


@pytest.mark.slow
def test_two_processes_run_the_whole_method_and_track_it(tmp_path, tiny_model):
    job = [str(ROOT / "train.py"), *SMALL, f"root={tmp_path}", *tiny_model, "tracker=wandb", "tracker.mode=offline"]
    on_cpu = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, *LAUNCHERS[2], *job], capture_output=True, text=True, cwd=ROOT, env=on_cpu)
    assert done.returncode in (0, 1), done.stderr  # launchers make 1 of a missed target's 3
    assert (tmp_path / "snapfusion/report/report.html").is_file(), done.stderr
    assert json.loads((tmp_path / "snapfusion/benchmark/results.json").read_text())["rows"]
    for stage in ("prune_unet", "prune_vae", "distill_steps", "evaluate"):
        assert list((tmp_path / "snapfusion" / stage).glob("wandb/offline-run-*/*.wandb")), stage
