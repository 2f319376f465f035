"""The jobs on a small random Stable Diffusion 3: pruned and distilled in steps, from a folder to an export."""

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from scripts.random_transformers import small_sd3_pipeline
from slimstep.models.pipeline import export_pipeline, load_pipeline
from tests.jobs import run_job
from tests.tiny import write_tiny_clip

pytestmark = pytest.mark.slow  # some 40 s of one core
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `model` and `clip`."""
    place = tmp_path_factory.mktemp("sd3")
    small_sd3_pipeline().save_pretrained(place / "model")
    export_pipeline(load_pipeline(place / "model"), place / "exported")
    (place / "clip").mkdir()
    write_tiny_clip(place / "clip")
    return place


def run(experiment: str, place: Path, *overrides: str) -> tuple[Path, str]:
    """The job's folder, and what it printed."""
    scorer = ["scorer=openclip", f"scorer.model=local-dir:{place}/clip", "scorer.pretrained=null", "scorer.force=true"]
    small = ["data.pairs.size=16", "train.steps=2", "train.batch_size=4", "eval.prompts=4", "eval.pictures=2",
             "eval.steps=2", "latency.iterations=3", "latency.text_length=20"]  # fmt: skip
    model = ["model=path", f"model.name_or_path={place}/model", f"root={place}/runs", f"name={experiment}"]
    done = run_job(f"+experiment={experiment}", *model, *scorer, *small, *overrides)
    assert done.returncode in (0, 3), done.stderr
    return place / "runs" / experiment, done.stdout


def stock_image(folder: Path):
    """What a stock pipeline draws, loaded without any flag."""
    pipeline = DiffusionPipeline.from_pretrained(folder, **NO_T5)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.transformer) is SD3Transformer2DModel
    return pipeline("a b", num_inference_steps=2, height=16, width=16).images[0], pipeline


def test_a_transformer_is_pruned(place):
    own = ["recovery.train.steps=2", "recovery.train.batch_size=4", "search.rounds=1", "search.target_fraction=0.7",
           "scoring.prompts=4", "scoring.steps=2", "latency.additive_samples=2"]  # fmt: skip
    path, _ = run("prune_transformer", place, *own)
    scores = json.loads((path / "round-00/scores.json").read_text())
    assert [*scores["sites"]] == [f"transformer_blocks.{i}" for i in range(5)]
    assert scores["protocol"]["prediction_type"] == "flow"
    decision = json.loads((path / "round-00/decision.json").read_text())
    removed = [block for block, repeats in decision["after"].items() if repeats == 0]
    assert removed and json.loads((path / "export/export_report.json").read_text())["is_stock"]
    assert "CLIP lost" in (path / "report.html").read_text()
    image, pipeline = stock_image(path / "export")
    assert image.size == (16, 16) and pipeline.transformer.config.num_layers == 5 - len(removed)


def test_a_transformer_is_pruned_by_its_sublayers(place):
    own = ["recovery.train.steps=2", "recovery.train.batch_size=4", "search.rounds=1", "search.target_fraction=0.7",
           "scoring.prompts=4", "scoring.steps=2", "latency.additive_samples=2", "search.blocks=sublayers",
           "recovery.train.lora_rank=2"]  # fmt: skip
    path, _ = run("prune_transformer", place, *own, "name=sublayers")
    path = path.with_name("sublayers")
    scores = json.loads((path / "round-00/scores.json").read_text())
    latencies = json.loads((path / "round-00/latency.json").read_text())["sites"]
    for part in ("", ".attn", ".ff"):
        assert f"transformer_blocks.1{part}" in scores["sites"] and latencies[f"transformer_blocks.1{part}"]["ms"] > 0
    decision = json.loads((path / "round-00/decision.json").read_text())
    removed = [block for block, repeats in decision["after"].items() if repeats == 0]
    report = json.loads((path / "export/export_report.json").read_text())
    assert removed and report["is_stock"] == (not any(block.endswith(("attn", "ff")) for block in removed))
    export = DiffusionPipeline.from_pretrained(path / "export", trust_remote_code=True, **NO_T5)
    export.set_progress_bar_config(disable=True)
    assert export("a b", num_inference_steps=2, height=16, width=16).images[0].size == (16, 16)


def test_similarity_is_of_whole_blocks(place):
    model = ["model=path", f"model.name_or_path={place}/model", f"root={place}/runs", "name=alike", "scorer.force=true"]
    scorer = ["scorer=openclip", f"scorer.model=local-dir:{place}/clip", "scorer.pretrained=null"]
    done = run_job("+experiment=prune_transformer", "search=similarity", "search.blocks=sublayers", *model, *scorer)
    assert done.returncode == 1 and "set search.blocks=whole" in done.stderr


def test_a_transformer_is_distilled_in_steps(place):
    path, _ = run("distill_steps", place, "distillation.steps=[8,4,2]", "curves.steps=[2,1]", "curves.guidance=[3.0]")
    points = json.loads((path / "evaluation.json").read_text())["points"]
    teacher = [("teacher", 8), ("teacher", 2), ("teacher", 1), ("teacher-stretched", 2)]
    assert [(point["model"], point["steps"]) for point in points] == [*teacher, ("steps-4", 2), ("steps-2", 2)]
    assert (path / "report.html").is_file()
    image, pipeline = stock_image(path / "steps-2/export")
    assert image.size == (16, 16) and type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert pipeline.scheduler.config.shift == 3.0
    pipeline.scheduler.set_timesteps(2)
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx([1, 0.75, 0])  # 3·½ / (1 + 2·½)


def test_students_of_a_flow_may_have_a_shift_of_their_own(place):
    own = ["distillation.steps=[8,4]", "curves.steps=[4]", "curves.guidance=[3.0]", "distillation.shift=1.5"]
    path = run("distill_steps", place, *own, "name=own")[0].with_name("own")
    config = json.loads((path / "steps-4/export/scheduler/scheduler_config.json").read_text())
    assert config["shift"] == 1.5 and config["shift_terminal"] == pytest.approx(1 / 3)  # 1.5·¼ / (1 + 0.5·¼)
    points = json.loads((path / "evaluation.json").read_text())["points"]
    assert [point["protocol"].get("shift_terminal") for point in points] == [None, None, *[pytest.approx(1 / 3)] * 2]


def test_a_shift_that_no_scheduler_would_have_is_refused(place, tmp_path, tiny_model):
    refused = ["+experiment=distill_steps", f"root={tmp_path}", "distillation.shift=2"]
    done = run_job(*refused, *tiny_model)
    assert done.returncode == 1 and "distillation.shift=2 is for flow matching" in done.stderr
    pipeline = small_sd3_pipeline()
    by_resolution = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline.register_modules(scheduler=by_resolution)
    pipeline.save_pretrained(tmp_path / "model")
    scorer = ["scorer=openclip", f"scorer.model=local-dir:{place}/clip", "scorer.pretrained=null"]
    done = run_job(*refused, "model=path", f"model.name_or_path={tmp_path}/model", *scorer)
    assert done.returncode == 1 and "takes its shift from the resolution" in done.stderr
    done = run_job(*refused, *tiny_model, "distillation.shift=0")
    assert done.returncode == 1 and "distillation.shift=0.0 must be above 0, as 3.0" in done.stderr


def test_objectives_that_a_flow_has_no_sampler_for_are_refused(place):
    scorer = ["scorer=openclip", f"scorer.model=local-dir:{place}/clip", "scorer.pretrained=null"]
    model = ["model=path", f"model.name_or_path={place}/model", f"root={place}/runs", "name=lcm", *scorer]
    done = run_job("+experiment=distill_steps", "objective=lcm", "distillation.steps=[32,4]", *model)
    assert done.returncode == 1 and "needs LCMScheduler, which neither flows nor EDM" in done.stderr
