"""The jobs on a small cascade of DeepFloyd IF's kind, as its recipe makes it: both stages are pruned and distilled in
steps, the first and the cascade are evaluated, and cascades timed."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
    UNet2DConditionModel,
)
from hydra import compose, initialize_config_dir

from scripts.shapes_cascade import STAGES
from scripts.shapes_cascade_recipe import FOLDERS, CascadeRecipe
from tests.jobs import run_job
from tests.tiny import write_tiny_clip

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `clip` and a cascade of the recipe's, trained for two steps: `model` and `second`."""
    place = tmp_path_factory.mktemp("if")
    small = ["text.model={d_model:32,d_kv:8,d_ff:16,num_layers:1,num_heads:2}", "first.model.sample_size=16",
             "second.model.sample_size=32", "second.crop=16", "prediction_type=epsilon"]  # fmt: skip
    for stage in ("first", "second"):
        small += [f"{stage}.model.block_out_channels=[8,16]", f"{stage}.model.attends=[false,true]",
                  f"{stage}.model.attention_head_dim=8"]  # fmt: skip
    small += [f"{stage}.train.{key}" for stage in ("text", "first", "second") for key in ("steps=2", "batch_size=4")]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        recipe = CascadeRecipe(compose("shapes_cascade", [f"root={place}/recipe", *small]))
    for stage in STAGES[:-1]:
        getattr(recipe, stage)()
    for stage, name in {"first": "model", "second": "second"}.items():
        (recipe.root / FOLDERS[stage]).rename(place / name)
    (place / "clip").mkdir()
    write_tiny_clip(place / "clip")
    return place


def run(experiment: str, place: Path, *overrides: str) -> Path:
    """The job's folder."""
    scorer = ["scorer=openclip", f"scorer.model=local-dir:{place}/clip", "scorer.pretrained=null", "scorer.force=true"]
    small = ["data.pairs.size=16", "train.steps=2", "train.batch_size=4", "eval.prompts=4", "eval.pictures=2",
             "eval.steps=2", "latency.iterations=3", "latency.text_length=20"]  # fmt: skip
    model = ["model=path", f"model.name_or_path={place}/model", f"root={place}/runs", f"name={experiment}"]
    done = run_job(f"+experiment={experiment}", *model, *scorer, *small, *overrides)
    assert done.returncode in (0, 3), done.stderr
    return place / "runs" / experiment


def stock_pipeline(folder: Path) -> DiffusionPipeline:
    """An export, which has drawn an image."""
    is_stock = json.loads((folder / "export_report.json").read_text())["is_stock"]
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=not is_stock)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is IFPipeline and pipeline.unet.config.out_channels == 6
    assert pipeline("a b", num_inference_steps=2).images[0].size == (16, 16)
    return pipeline


def test_a_first_stage_is_pruned(place):
    own = ["recovery.train.steps=2", "recovery.train.batch_size=4", "search.rounds=1", "search.target_fraction=0.8",
           "scoring.prompts=4", "scoring.steps=2", "latency.additive_samples=2"]  # fmt: skip
    path = run("prune_unet", place, *own)
    decision = json.loads((path / "round-00/decision.json").read_text())
    removed = [block for block, repeats in decision["after"].items() if repeats == 0]
    scheduler = stock_pipeline(path / "export").scheduler
    assert removed and type(scheduler) is DDPMScheduler
    assert scheduler.config.variance_type == "learned_range" and scheduler.config.thresholding
    logged = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["stage"] == "recovery" and all(line["variance"] > 0 for line in logged)


def test_a_first_stage_is_distilled_in_steps(place):
    conversion = ["v_prediction.train.steps=2", "v_prediction.train.batch_size=4"]
    curves = ["curves.steps=[2]", "curves.guidance=[3.0]"]
    path = run("distill_steps", place, "distillation.steps=[4,2]", *curves, *conversion)
    models = [point["model"] for point in json.loads((path / "evaluation.json").read_text())["points"]]
    assert models == ["teacher", "teacher", "teacher-dpm", "teacher-v", "steps-2"]
    student = stock_pipeline(path / "steps-2/export")
    assert type(student.unet) is UNet2DConditionModel and type(student.scheduler) is DDIMScheduler
    assert student.scheduler.config.prediction_type == "v_prediction"


def test_first_stages_are_evaluated_by_their_own_scheduler(place):
    models = f"models={{teacher: {{path: {place}/model, steps: [4, 2]}}}}"
    path = run("evaluate", place, "curves.guidance=[3.0]", models)
    teacher, fewer = json.loads((path / "evaluation.json").read_text())["points"]
    assert teacher["metrics"]["clip"]["mean"] and fewer["metrics"]["psnr"]["mean"] > 0


# ---- the second stage, behind the first


@pytest.fixture(scope="module")
def second(place) -> list[str]:
    """Overrides that make the second stage the model."""
    return [f"model.name_or_path={place}/second", f"model.first_stage={{path: {place}/model, steps: 2}}"]


def second_pipeline(folder: Path) -> DiffusionPipeline:
    """An export, which has made a picture larger."""
    is_stock = json.loads((folder / "export_report.json").read_text())["is_stock"]
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=not is_stock)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is IFSuperResolutionPipeline
    image = torch.zeros(1, 3, 16, 16)
    assert pipeline("a b", image=image, num_inference_steps=2).images[0].size == (32, 32)
    return pipeline


def test_a_second_stage_is_pruned(place, second):
    own = ["recovery.train.steps=2", "recovery.train.batch_size=4", "search.rounds=1", "search.target_fraction=0.8",
           "scoring.prompts=4", "scoring.steps=2", "latency.additive_samples=2"]  # fmt: skip
    path = run("prune_unet", place, *second, *own, "name=second")
    assert second_pipeline(place / "runs/second/export").unet.config.in_channels == 6 and path


def test_a_second_stage_is_distilled_in_steps(place, second):
    conversion = ["v_prediction.train.steps=2", "v_prediction.train.batch_size=4"]
    curves = ["distillation.steps=[4,2]", "curves.steps=[2]", "curves.guidance=[3.0]", "name=second-steps"]
    run("distill_steps", place, *second, *curves, *conversion)
    assert type(second_pipeline(place / "runs/second-steps/steps-2/export").scheduler) is DDIMScheduler


def test_a_second_stage_is_packaged_and_tried_on_what_the_first_draws(place, second):
    pytest.importorskip("onnxscript")
    run("package", place, *second, "package.formats=[onnx]", "package.steps=[2]", "package.guidance_scale=2")
    assert json.loads((place / "runs/package/onnx.json").read_text())["difference"] < 1e-3


def cascade(place: Path, steps: int) -> str:
    return f"{{path: {place}/second, first_stage: {{path: {place}/model, steps: {steps}}}}}"


def test_cascades_are_evaluated_each_behind_its_own_first_stage(place):
    models = f"models={{few: {cascade(place, 2)}, fewer: {cascade(place, 1)}}}"
    run("evaluate", place, models, "curves.steps=[2]", "curves.guidance=[1]", "name=cascades")
    few, fewer = json.loads((place / "runs/cascades/evaluation.json").read_text())["points"]
    assert [point["protocol"]["first_stage"]["steps"] for point in (few, fewer)] == [2, 1]
    assert fewer["metrics"]["psnr"]["mean"] < 60


def test_a_cascade_is_timed_as_one_pipeline(place):
    few = ["benchmark.batches=[1]", "benchmark.tasks=[txt2img]", "benchmark.compile=[eager]", "benchmark.images=2"]
    run("pipelines", place, f"models={{two: {cascade(place, 2)}}}", *few, "latency.seconds=1", "name=cascade")
    (row,) = json.loads((place / "runs/cascade/results.json").read_text())["rows"]
    assert row["cannot"] is None and row["parts_ms"]["first stage"] > 0 and row["parts_ms"]["UNet"] > 0
