"""Timing: parts leave nothing out, ratios are of neighbours, and the jobs' rows say what ran and what could not."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler

from slimstep.eval.config import LatencyConfig
from slimstep.eval.timing.inference import InferenceConfig
from slimstep.eval.timing.speed import TimedPipeline, measure, speedup
from slimstep.eval.timing.stage_timer import timed_components
from slimstep.eval.timing.tasks import TASKS, task_pipeline
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from tests.jobs import run_job
from tests.tiny import slow, small_pipeline, tiny_sdxl_pipeline
from tests.user_errors import error_line

CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parents[2]
SMALL = ["eval.prompts=4", "benchmark.images=2", "eval.steps=2", "latency.iterations=3", "latency.warmup=1"]


def timed(pipeline, batch=1, steps=4, **options):
    return TimedPipeline(pipeline, InferenceConfig(), ["a cat", "two dogs"], steps, 2.5, CPU, batch, kwargs=options)


def test_the_parts_of_a_call_leave_nothing_of_it_out(tiny_pipeline_folder):
    one = timed(load_pipeline(tiny_pipeline_folder))
    with timed_components(one.pipeline, CPU) as timer:
        spent = timer.time(one.call)
        assert [part for part, _ in timer.marks].count("UNet") == 4
    whole = 1e3 * (timer.marks[-1][1] - timer.marks[0][1])
    assert sum(spent.values()) == pytest.approx(whole)
    assert all(spent[part] > 0 for part in ("text encoder", "UNet", "scheduler", "VAE", "host"))
    assert spent["ControlNet"] == 0
    marks = len(timer.marks)
    one.call()
    assert len(timer.marks) == marks  # nothing is left that marks


def test_schedulers_that_draw_noise_draw_it_for_the_image_and_no_safety_checker_is_timed(tiny_pipeline_folder):
    pipeline = load_pipeline(tiny_pipeline_folder)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.safety_checker = copy.deepcopy(pipeline.vae)  # as a checker it would fail
    one = timed(pipeline)
    first, _ = one.images(2), torch.manual_seed(5)
    assert torch.equal(one.images(2), first)
    assert torch.equal(first, one.sampler.images(pipeline.unet, one.prompts, [0, 1]))


def test_time_spent_in_a_network_is_its_own_part(tiny_pipeline_folder):
    one = timed(load_pipeline(tiny_pipeline_folder))
    busy = torch.randn(400, 400)

    def work(*_):
        for _ in range(100):
            busy @ busy

    with timed_components(one.pipeline, CPU) as timer:
        one.call()
        before = timer.time(one.call)
        one.pipeline.vae.decoder.mid_block.register_forward_hook(work)
        after = timer.time(one.call)
    grown = {part: after[part] - before[part] for part in after}
    assert max(grown, key=grown.get) == "VAE"


@pytest.mark.parametrize("make", [small_pipeline, *slow(tiny_sdxl_pipeline)])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_around_one_unet(make, task):
    pipeline, options = task_pipeline(make(), task, batch=2)
    one = timed(pipeline, batch=2, **options)
    row = measure(one, {}, LatencyConfig(iterations=3, warmup=1))
    assert row["unet_calls"] == (3 if task in ("img2img", "inpaint") else 4)  # strength 0.75
    assert ("ControlNet" in row["parts_ms"]) == (task in ("controlnet", "two_controlnets"))


def test_a_ratio_is_that_of_neighbouring_calls():
    drifting = [1.0, 5.0, 2.0, 9.0]
    faster = speedup([3 * ms for ms in drifting], drifting)
    assert faster["ratio"] == faster["low"] == faster["high"] == pytest.approx(3)


# ---- the jobs ----


def run(experiment, *overrides):
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"+experiment={experiment}",
        f"name={experiment}",
        *SMALL,
        *map(str, overrides),
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def students(tmp_path_factory, tiny_pipeline_folder):
    teacher, folder = load_pipeline(tiny_pipeline_folder), tmp_path_factory.mktemp("models") / "student"
    export_pipeline(with_unet(teacher, teacher.unet.with_architecture({"mid_block.attentions.0": 0})), folder)
    return f"models={{teacher: {tiny_pipeline_folder}, pruned: {folder}}}"


@pytest.mark.slow
def test_the_benchmark_has_a_row_for_every_combination_and_makes_none_twice(tmp_path, tiny_model, students):
    chosen = ["benchmark.dtype=[float32,tf32]", "benchmark.attention=[sdpa,vanilla]", "benchmark.batches=[2]",
              "benchmark.compile=[eager]"]  # fmt: skip
    done = run("benchmark", *tiny_model, students, *chosen, f"root={tmp_path}")
    assert done.returncode == 0, done.stderr
    path, last = tmp_path / "benchmark", json.loads(done.stdout.splitlines()[-1])
    assert len(last["rows"]) == 2 * 2 * 2
    for row in last["rows"]:
        if row["setup"]["dtype"] == "tf32":
            assert "CUDA" in row["cannot"] and "ms" not in row
        else:
            assert row["ms"]["n"] >= 3 and row["psnr"]["mean"] > 45 and row["share_of_peak"] > 0
            assert row["speedup"]["base"]["low"] <= row["speedup"]["base"]["ratio"] <= row["speedup"]["base"]["high"]
    for name in ("table.md", "results.csv", "report.html", "report/parts-teacher.png", "report/parts-pruned.png"):
        assert (path / name).is_file(), name
    gone = next(path.glob("rows/pruned/steps-*/batch-2/*vanilla_float32*.json"))
    for file in (gone, path / "results.json", path / "report.html"):
        file.unlink()
    before = {file: file.stat().st_mtime_ns for file in path.glob("rows/**/*.json")}
    again = run("benchmark", *tiny_model, students, *chosen, f"root={tmp_path}")
    assert again.returncode == 0, again.stderr
    assert gone.is_file() and before == {file: file.stat().st_mtime_ns for file in before}


@pytest.mark.slow
def test_the_cumulative_benchmark_builds_upon_what_ran_and_says_what_did_not(tmp_path, tiny_model, students):
    rows = (
        "[{name: plain, attention: vanilla}, {name: TF32, dtype: tf32}, {name: one step, steps: 1}, "
        "{name: pruned UNet, model: pruned}, {name: narrow, vae: narrow}, {name: many steps, steps: 20}]"
    )
    done = run("cumulative", *tiny_model, students, f"benchmark.rows={rows}", f"root={tmp_path}", "eval.steps=10")
    assert done.returncode == 0, done.stderr
    plain, tf32, one, pruned, narrow, many = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert "CUDA" in tf32["cannot"] and "models names no 'narrow'" in narrow["cannot"]
    assert [row["kept"] for row in (plain, tf32, one, narrow, many)] == [True, False, True, False, False]
    assert set(plain["speedup"]) == {"itself"} and set(one["speedup"]) == {"first", "before"} and one["unet_calls"] == 1
    assert pruned["unet_calls"] == 1 and pruned["psnr"]["mean"] < 58
    assert (tmp_path / "cumulative/report/cumulative.png").is_file()


def test_the_pipelines_table_counts_denoising_steps(tmp_path, tiny_model):
    done = run_job("+experiment=pipelines", "name=pipelines", *SMALL, *tiny_model, f"root={tmp_path}", "eval.steps=4",
                   "benchmark.tasks=[txt2img,img2img]", "benchmark.batches=[2]", "benchmark.compile=[eager]",
                   "benchmark.base={memory_format: channels_last}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain, changed = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert (plain["task"], plain["unet_calls"]) == ("txt2img", 4) and changed["unet_calls"] == 3
    assert plain["its"] == pytest.approx(4e3 / plain["ms"]["median"])


@pytest.mark.parametrize(("experiment", "wrong", "culprit"), [
    ("benchmark", "benchmark.attention=[flsh]", "flsh"),
    ("benchmark", "benchmark.base={speed: 1}", "speed"),
    ("benchmark", "benchmark.base=bfloat16", "bfloat16"),
    ("benchmark", "benchmark.images=9", "benchmark.images=9"),
    ("cumulative", "benchmark.batches=[1,2]", "batches"),
    ("benchmark", "benchmark.dtype=[]", "benchmark.dtype"),
    ("benchmark", "models=[/nowhere]", "/nowhere"),
    ("pipelines", "benchmark.tasks=[txt2vid]", "txt2vid"),
    ("cumulative", "benchmark.rows=[{name: a, dytpe: x}]", "dytpe"),
    ("cumulative", "benchmark.rows=[{steps: 3}]", "name"),
    ("cumulative", "benchmark.rows=[]", "benchmark.rows"),
])  # fmt: skip
def test_a_mistake_is_one_line(leave, tiny_model, experiment, wrong, culprit):
    assert culprit in error_line(*leave(f"+experiment={experiment}", *tiny_model, *SMALL, wrong))


def test_images_of_prompts_want_a_scorer(leave):
    assert "scorer=none" in error_line(*leave("+experiment=benchmark", *SMALL, "scorer=none"))


@pytest.mark.slow
def test_a_compiled_row_says_what_compiling_costs(tmp_path, tiny_model):
    done = run("benchmark", *tiny_model, "benchmark.dtype=[float32]", "benchmark.batches=[1]",
               "benchmark.compile=[regional]", "benchmark.cold_start=true", f"root={tmp_path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["cannot"] is None and row["graphs"]["graphs"] > 0 and row["graphs"]["breaks"] == row["recompiled"] == 0
    assert row["psnr"]["mean"] > 45
    cost = row["cold_start"]
    assert all(cost[way]["first_s"] > 0 for way in ("eager", "cold", "artifacts", "kept_cache"))
    assert next((tmp_path / "benchmark/artifacts").rglob("*.bin")).stat().st_size == cost["cold"]["artifact_bytes"] > 0
