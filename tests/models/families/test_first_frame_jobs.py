"""The jobs on a small random CogVideoX that begins with a frame: pruned, distilled in steps and evaluated."""

import json
from pathlib import Path

import pytest
from diffusers import CogVideoXImageToVideoPipeline
from PIL import Image

from scripts.random_transformers import FIRST_FRAME, small_cogvideox_pipeline
from tests.jobs import run_job
from tests.tiny import write_tiny_clip

SMALL = ["data.pairs.size=8", "train.steps=2", "train.batch_size=2", "eval.prompts=3", "eval.pictures=2",
         "eval.steps=2", "latency.iterations=3", "data=shapes_video"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `model`, `clip`, and `images` with captions."""
    place = tmp_path_factory.mktemp("first-frames")
    small_cogvideox_pipeline(**FIRST_FRAME).save_pretrained(place / "model")
    for part in ("clip", "images"):
        (place / part).mkdir()
    write_tiny_clip(place / "clip")
    for colour in ("red", "green", "blue", "white"):
        Image.new("RGB", (20, 20), colour).save(place / f"images/{colour}.png")
        (place / f"images/{colour}.txt").write_text(f"a {colour} wall")
    return place


def overrides_of(place: Path) -> list[str]:
    scorer = ["scorer=openclip", f"scorer.model=local-dir:{place}/clip", "scorer.pretrained=null", "scorer.force=true"]
    return [*scorer, "model=path", f"model.name_or_path={place}/model", f"root={place}/runs", *SMALL]


def run(experiment: str, place: Path, *overrides: str) -> Path:
    """The job's folder."""
    done = run_job(f"+experiment={experiment}", *overrides_of(place), f"name={experiment}", *overrides)
    assert done.returncode in (0, 3), done.stderr
    return place / "runs" / experiment


def draw(folder: Path) -> CogVideoXImageToVideoPipeline:
    """The export, loaded by diffusers alone, which has made a video of an image."""
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(Image.new("RGB", (16, 16)), "a b", num_inference_steps=2, num_frames=9, output_type="np")
    assert made.frames.shape == (1, 9, 16, 16, 3)
    return pipeline


@pytest.mark.slow
def test_it_is_pruned_by_captions_and_first_frames(place):
    own = ["recovery.train.steps=2", "recovery.train.batch_size=2", "search.rounds=1", "search.target_fraction=0.7",
           "scoring.prompts=2", "scoring.steps=1", "latency.additive_samples=1",
           "search.keep=['*blocks.0']"]  # fmt: skip
    path = run("prune_transformer", place, *own)
    decision = json.loads((path / "round-00/decision.json").read_text())
    removed = [block for block, repeats in decision["after"].items() if repeats == 0]
    assert removed and draw(path / "export").transformer.config.num_layers == 4 - len(removed)
    metrics = json.loads((path / "evaluation.json").read_text())["points"][-1]["metrics"]
    assert {"clip", "clip_worst_frame", "consistency", "motion", "psnr"} <= metrics.keys()
    assert "pipeline_tag: image-to-video" in (path / "export/README.md").read_text()


@pytest.mark.slow
def test_it_is_distilled_in_steps_and_evaluated_by_images_of_a_folder(place):
    frames = f"data.first_frames={place}/images"
    path = run("distill_steps", place, "distillation.steps=[4,2]", "curves.steps=[2]", "curves.guidance=[3.0]",
               "evaluation.real_images=4", "model.video={noise_aug_strength: 0.05}", frames)  # fmt: skip
    assert type(draw(path / "steps-2/export").scheduler).__name__ == "CogVideoXDDIMScheduler"
    models = f"models={{teacher: {place}/model, student: {path}/steps-2/export}}"
    path = run("evaluate", place, models, "curves.steps=[2]", "curves.guidance=[3.0]", frames,
               "evaluation.real_images=4")  # fmt: skip
    evaluation = json.loads((path / "evaluation.json").read_text())
    assert all(caption.endswith(" wall") for caption in evaluation["shown"])
    assert evaluation["points"][-1]["metrics"]["motion"]["ratio_to_reference"]["ratio"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["benchmark", "pipelines"])
def test_its_pipeline_is_timed_from_captions_and_first_frames(experiment, place):
    path = run(experiment, place, "benchmark.dtype=[float32]", "benchmark.compile=[eager]", "benchmark.batches=[2]",
               "benchmark.memory_format=[contiguous]", "benchmark.images=2", "benchmark.tasks=[txt2img]",
               "latency.warmup=1", "latency.seconds=1")  # fmt: skip
    (row,) = json.loads((path / "results.json").read_text())["rows"]
    assert set(row["parts_ms"]) == {"text encoder", "UNet", "scheduler", "VAE", "host"} and row["unet_rows"] == 8
    assert experiment == "pipelines" or (row["psnr"]["mean"] > 50 and abs(row["clip_difference"]["mean"]) < 1e-3)


@pytest.mark.parametrize(("experiment", "overrides", "reason"), [
    ("prune_transformer", ["data=shapes"], "needs data of videos, not of images"),
    ("prune_transformer", ["data.prompt_file=prompts.txt"], "is for models that read captions alone"),
    ("prune_transformer", ["data.frames=17"], "learnt the positions of 9 frames alone"),
    ("prune_transformer", ["data.resolution=32"], "learnt the positions of 16 alone"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(experiment, overrides, reason, place):
    done = run_job(f"+experiment={experiment}", *overrides_of(place), f"name=refused-{experiment}", *overrides)
    assert done.returncode == 1 and reason in done.stderr.splitlines()[-1], done.stderr
