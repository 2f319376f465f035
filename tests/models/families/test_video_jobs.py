"""The jobs on small random CogVideoX and Wan: pruned, distilled in steps and evaluated, from a folder to an export."""

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from scripts.random_transformers import small_cogvideox_pipeline, small_wan_pipeline
from tests.jobs import run_job
from tests.tiny import write_tiny_clip

pytestmark = pytest.mark.slow
SMALL = ["data.pairs.size=8", "train.steps=2", "train.batch_size=2", "eval.prompts=3", "eval.pictures=2",
         "eval.steps=2", "latency.iterations=3", "data=shapes_video"]  # fmt: skip


PIPELINES = {"CogVideoX": small_cogvideox_pipeline, "Wan": small_wan_pipeline}

SCHEDULERS = {"CogVideoX": "CogVideoXDDIMScheduler", "Wan": "FlowMatchEulerDiscreteScheduler"}


@pytest.fixture(scope="module", params=PIPELINES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def place(family, tmp_path_factory) -> Path:
    """A folder with `model` and `clip`."""
    place = tmp_path_factory.mktemp("video")
    PIPELINES[family]().save_pretrained(place / "model")
    (place / "clip").mkdir()
    write_tiny_clip(place / "clip")
    return place


def run(experiment: str, place: Path, *overrides: str) -> Path:
    """The job's folder."""
    scorer = ["scorer=openclip", f"scorer.model=local-dir:{place}/clip", "scorer.pretrained=null", "scorer.force=true"]
    model = ["model=path", f"model.name_or_path={place}/model", f"root={place}/runs", f"name={experiment}"]
    done = run_job(f"+experiment={experiment}", *model, *scorer, *SMALL, *overrides)
    assert done.returncode in (0, 3), done.stderr
    return place / "runs" / experiment


def stock_pipeline(folder: Path, family: str) -> DiffusionPipeline:
    """Loaded without any flag; it has drawn a video."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "num_frames": 9} if family == "Wan" else {}  # whose pipeline has its own
    assert pipeline("a b", num_inference_steps=2, output_type="np", **size).frames.shape == (1, 9, 16, 16, 3)
    return pipeline


def metrics_of(path: Path) -> dict:
    return json.loads((path / "evaluation.json").read_text())["points"][-1]["metrics"]


def test_a_video_transformer_is_pruned(family, place):
    own = ["recovery.train.steps=2", "recovery.train.batch_size=2", "search.rounds=1", "search.target_fraction=0.7",
           "scoring.prompts=3", "scoring.steps=2", "latency.additive_samples=2", "data.frames=9",
           "search.keep=['*blocks.0']"]  # fmt: skip
    path = run("prune_transformer", place, *own)
    decision = json.loads((path / "round-00/decision.json").read_text())
    removed = [block for block, repeats in decision["after"].items() if repeats == 0]
    assert removed and not any(block.endswith("blocks.0") for block in removed)
    assert json.loads((path / "export/export_report.json").read_text())["is_stock"]
    after = stock_pipeline(path / "export", family).transformer
    assert after.config.num_layers == 4 - len(removed)
    assert {"clip", "clip_worst_frame", "consistency", "motion", "psnr"} <= metrics_of(path).keys()
    with Image.open(path / "images/student/steps-2-guidance-2.5/000.png") as picture:
        assert picture.size == (9 * 16, 16), "its frames beside each other"
    models = len(json.loads((path / "evaluation.json").read_text())["points"])
    assert (path / "report.html").read_text().count("data:image/webp") == models * 2 * 2, "two videos, still and moving"
    assert ".frames" in (path / "export/README.md").read_text()


def test_a_video_transformer_is_distilled_in_steps(family, place):
    own = ["distillation.steps=[8,4,2]", "curves.steps=[2]", "curves.guidance=[3.0]", "evaluation.real_images=4",
           "data.resolution=16x32"]  # fmt: skip
    path = run("distill_steps", place, *own)
    names = [point["model"] for point in json.loads((path / "evaluation.json").read_text())["points"]]
    assert names[0] == "teacher" and names[-2:] == ["steps-4", "steps-2"]
    scheduler = stock_pipeline(path / "steps-2/export", family).scheduler
    assert type(scheduler).__name__ == SCHEDULERS[family]
    assert metrics_of(path)["fd"]["features"].endswith("mean over frames")


def test_videos_are_evaluated_at_the_frames_and_the_size_that_the_data_have(place):
    own = [f"models={{teacher: {place}/model}}", "curves.steps=[2]", "curves.guidance=[3.0]", "data.frames=17",
           "evaluation.real_images=4", "data.resolution=16x32"]  # fmt: skip
    path = run("evaluate", place, *own)
    point = json.loads((path / "evaluation.json").read_text())["points"][0]
    assert point["protocol"]["latents"] == [4, 5, 4, 8]
    worst, mean = (point["metrics"][name]["mean"] for name in ("clip_worst_frame", "clip"))
    assert worst < mean


def test_whole_pipelines_of_videos_are_timed(family, place):
    own = ["benchmark.dtype=[float32]", "benchmark.compile=[eager]", "benchmark.batches=[1]", "benchmark.images=2",
           "benchmark.memory_format=[contiguous,channels_last]", "latency.warmup=1", "latency.seconds=1"]  # fmt: skip
    path = run("benchmark", place, *own)
    timed, refused = json.loads((path / "results.json").read_text())["rows"]
    assert set(timed["parts_ms"]) == {"text encoder", "UNet", "scheduler", "VAE", "host"}
    assert timed["unet_calls"] == (4 if family == "Wan" else 2) and timed["unet_rows"] == 4
    assert timed["psnr"]["mean"] > 50 and timed["clip_difference"]["mean"] == 0 and timed["share_of_peak"] > 0
    assert "no channels_last for the 3-D convolutions of " in refused["cannot"]


def test_frames_that_the_vae_cannot_take_end_a_job_in_one_line(place):
    done = run_job("+experiment=prune_transformer", "model=path", f"model.name_or_path={place}/model", *SMALL,
                   f"root={place}/runs", "name=refused", "scorer=none", "data.frames=8")  # fmt: skip
    assert done.returncode == 1 and "videos of 8 frames do not fit this pipeline" in done.stderr
