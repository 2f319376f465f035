"""Every job to its end on a device that is not there, in bfloat16: devices and dtypes hold, scores mean nothing."""

import json

import pytest

EVAL = ["eval.prompts=4", "eval.pictures=2", "eval.steps=2"]
TRAIN = ["train.steps=2", "train.batch_size=4", "recovery.train.steps=2", "recovery.train.batch_size=4"]
CURVES = ["curves.steps=[2]", "curves.guidance=[2.5]"]
TIMES = ["latency.iterations=1", "latency.warmup=1", "benchmark.images=2", "eval.prompts=4", "eval.steps=2"]
STEPS = [*TRAIN, "eval.prompts=4", "eval.pictures=2", *CURVES, "v_prediction.train.steps=2"]
LEFT_OUT = {"evaluate": ["evolved", "narrow_decoder", "distilled"],
            "benchmark": ["repaired", "narrow_decoder", "distilled"]}  # fmt: skip
METHOD = [
    *TRAIN, *EVAL[:2], "eval.steps=1", "curves.steps=[1]", "curves.guidance=[2.5]", "scoring.prompts=4",
    "scoring.steps=1", "scoring.batch_size=64", "search.rounds=1", "latents.count=4", "latents.prompts=4",
    "latents.steps=1", "v_prediction.train.steps=2", "latency.iterations=2", "latency.warmup=1",
    "latency.additive_samples=1", "benchmark.images=2", "stages.distill_steps.distillation.steps=[2,1]",
    "stages.evaluate.models.teacher.steps=[2]", "stages.benchmark.models.teacher.steps=[2]",
    *(f"stages.{stage}.models.{name}=null" for stage, names in LEFT_OUT.items() for name in names),
]  # fmt: skip
JOBS = {
    "benchmark": [*TIMES, "benchmark.dtype=[tf32,bfloat16]", "benchmark.compile=[eager]", "benchmark.batches=[2]"],
    "pipelines": [*TIMES, "benchmark.tasks=[img2img,two_controlnets]", "benchmark.compile=[eager]",
                  "benchmark.batches=[1]"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_ranking(monkeypatch):
    """Scores of zeros are all equal, and have none."""
    monkeypatch.setattr("slimstep.eval.metrics.compare.spearman", lambda a, b: 0.0)


def test_latents_are_cached_and_images_evaluated(run, tmp_path):
    assert run("cache_latents")[0] == 0
    code, waits = run("evaluate", *EVAL, *CURVES, "evaluation.diversity_prompts=2", "evaluation.diversity_seeds=2")
    assert code == 0 and list((tmp_path / "runs").glob("evaluate*/evaluation.json"))
    assert any("eval/metrics/clip.py" in wait for wait in waits)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_job_runs_to_its_end(run, tmp_path, name):
    code, waits = run(name, *JOBS[name])
    assert code in (0, 3) and waits
    for rows in (tmp_path / "runs").glob("*/rows/*.json"):
        assert json.loads(rows.read_text())["cannot"] is None, rows


@pytest.mark.slow
def test_the_whole_method_runs_to_its_page(run, tmp_path):
    code, _ = run("snapfusion", *METHOD)
    assert code in (0, 3)
    made = tmp_path / "runs/snapfusion"
    assert {"export", "export_student", "report"} <= {path.name for path in made.iterdir()}
    assert (made / "report/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["guidance", "lcm"])
def test_other_students_are_distilled_to_their_end(run, objective):
    steps = ["distillation.steps=[8,4]", "objective.grid_steps=50"] if objective == "lcm" else []
    code, _ = run("distill_steps", f"objective={objective}", *STEPS, *(steps or ["distillation.steps=[4,2]"]))
    assert code == 0
