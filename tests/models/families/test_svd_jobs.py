"""The jobs on a small random Stable Video Diffusion: pruned, distilled in steps and evaluated, by first frames."""

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from scripts.random_deepfloyd import small_if_pipeline
from scripts.random_svd import small_svd_pipeline
from slimstep.eval.timing.inference import CannotRunError
from slimstep.eval.timing.tasks import random_controlnet
from tests.jobs import run_job
from tests.tiny import write_tiny_clip

SMALL = ["data.pairs.size=8", "train.steps=2", "train.batch_size=2", "eval.prompts=3", "eval.pictures=2",
         "eval.steps=2", "latency.iterations=3"]  # fmt: skip
TIMED = ["benchmark.dtype=[float32]", "benchmark.compile=[eager]", "benchmark.images=2", "latency.warmup=1",
         "latency.seconds=1", "benchmark.memory_format=[contiguous]"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `model`, `clip` and `images`."""
    place = tmp_path_factory.mktemp("svd")
    small_svd_pipeline(levels=2).save_pretrained(place / "model")
    for part in ("clip", "images"):
        (place / part).mkdir()
    write_tiny_clip(place / "clip")
    for k, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (20, 20), colour).save(place / f"images/{k}.png")
    return place


def run(experiment: str, place: Path, *overrides: str) -> Path:
    """The job's folder."""
    model = [f"model.name_or_path={place}/model", f"root={place}/runs", f"name={experiment}"]
    done = run_job(f"+experiment={experiment}", *model, *SMALL, *overrides)
    assert done.returncode in (0, 3), done.stderr
    return place / "runs" / experiment


def draw(folder: Path) -> DiffusionPipeline:
    """The export, loaded by diffusers alone, which has made a video of an image."""
    is_stock = json.loads((folder / "export_report.json").read_text())["is_stock"]
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=not is_stock)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(Image.new("RGB", (16, 16)), num_inference_steps=2, height=16, width=16, output_type="np")
    assert made.frames.shape == (1, 3, 16, 16, 3)
    return pipeline


def points_of(path: Path) -> list[dict]:
    return json.loads((path / "evaluation.json").read_text())["points"]


@pytest.mark.slow
def test_it_is_pruned_by_the_error_of_its_videos(place):
    own = ["recovery.train.steps=2", "recovery.train.batch_size=2", "search.rounds=1", "search.target_fraction=0.9",
           "scoring.prompts=2", "scoring.steps=1", "latency.additive_samples=1"]  # fmt: skip
    path = run("prune_svd", place, *own)
    scores = json.loads((path / "round-00/scores.json").read_text())
    assert scores["protocol"]["metric"] == "image_error" and scores["protocol"]["video"]["motion_bucket_id"] == 127
    assert any(".temporal_" in block for block in scores["sites"])
    student = points_of(path)[-1]
    assert {"image_error", "fd", "motion", "psnr"} == student["metrics"].keys()
    assert student["metrics"]["fd"]["features"].endswith("mean over frames")
    assert student["metrics"]["motion"]["ratio_to_reference"]["ratio"] > 0
    names = json.loads((path / "prompts.json").read_text())["eval_prompts"]
    assert all(" moves " in name for name in names), "first frames are called by their videos' captions"
    card = (path / "export/README.md").read_text()
    assert "pipeline_tag: image-to-video" in card and "max_guidance_scale=3, height=16, width=16, fps=7" in card
    kept = draw(path / "export").unet
    decision = json.loads((path / "round-00/decision.json").read_text())
    assert [block for block, repeats in decision["after"].items() if repeats == 0] and "depths" in kept.config


@pytest.mark.slow
def test_it_is_distilled_in_steps(place):
    own = ["distillation.steps=[4,2]", "curves.steps=[2]", "evaluation.real_images=4"]
    path = run("distill_svd", place, *own)
    names = [point["model"] for point in points_of(path)]
    assert names[0] == "teacher" and names[-1] == "steps-2"
    assert type(draw(path / "steps-2/export").scheduler).__name__ == "EulerDiscreteScheduler"
    assert points_of(path)[-1]["metrics"]["latent_error"]["mean"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("of_folder", [False, True])
def test_it_is_evaluated_by_captions_only_where_there_are_some(of_folder, place):
    scorer = ["scorer=openclip", f"scorer.model=local-dir:{place}/clip", "scorer.pretrained=null", "scorer.force=true"]
    frames = [f"data.first_frames={place}/images"] if of_folder else []
    own = ["model=path", "data=shapes_video", "curves.guidance=[3]", f"models={{teacher: {place}/model}}"]
    name = f"name=evaluate-{of_folder}"
    run("evaluate", place, *own, "curves.steps=[4,2]", "evaluation.real_images=4", *scorer, *frames, name)
    (_, point) = points_of(place / f"runs/evaluate-{of_folder}")
    assert ("clip" in point["metrics"]) != of_folder and "consistency" in point["metrics"]
    assert point["metrics"]["image_error"]["mean"] > 0


@pytest.mark.slow
def test_it_is_packaged_and_tried_on_a_first_frame(place):
    pytest.importorskip("onnxscript")
    path = run("package", place, "model=path", "data=shapes_video", "package.formats=[onnx]", "package.steps=[2]",
               "package.guidance_scale=3")  # fmt: skip
    assert json.loads((path / "onnx.json").read_text())["difference"] < 1e-3
    with Image.open(path / "images/onnx-0.webp") as video:
        assert (video.n_frames, video.size) == (3, (16, 16))


@pytest.mark.slow
@pytest.mark.parametrize("of_folder", [False, True])
def test_its_pipeline_is_timed_from_first_frames(of_folder, place):
    frames = [f"data.first_frames={place}/images"] if of_folder else []
    own = ["model=path", "data=shapes_video", f"scorer.model=local-dir:{place}/clip", "scorer=openclip",
           "scorer.pretrained=null", "scorer.force=true"]  # fmt: skip
    path = run("benchmark", place, *own, *TIMED, *frames, "benchmark.batches=[1,2]", f"name=benchmark-{of_folder}")
    one, two = json.loads((path.parent / f"benchmark-{of_folder}/results.json").read_text())["rows"]
    assert set(one["parts_ms"]) == {"image encoder", "UNet", "scheduler", "VAE", "host"}
    assert (one["unet_rows"], two["unet_rows"]) == (4, 8) and one["psnr"]["mean"] > 50
    assert ("clip_difference" in one) != of_folder, "names of images are no captions"


@pytest.mark.parametrize("make", [small_svd_pipeline, small_if_pipeline])
def test_random_controlnets_are_of_networks_of_latents_of_images(make):
    with pytest.raises(CannotRunError, match=f"not for a {type(pipeline := make()).__name__}"):
        random_controlnet(pipeline, 0)


@pytest.mark.parametrize(("experiment", "overrides", "reason"), [
    ("package", ["data=shapes_video", "package.formats=[coreml]"], "videos are packaged as onnx or aoti"),
    ("prune_svd", ["search.metric=clip"], "search.metric=clip scores no single images; choose from ['image_error'"),
    ("prune_svd", ["data=shapes"], "needs data of videos, not of images"),
    ("prune_svd", ["data.prompt_file=prompts.txt"], "is for models that read captions"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(experiment, overrides, reason, place):
    own = [f"root={place}/runs", f"name=refused-{experiment}", f"model.name_or_path={place}/model", "model=path"]
    done = run_job(f"+experiment={experiment}", *own, "data.pairs.size=8", *overrides)
    assert done.returncode == 1 and reason in done.stderr.splitlines()[-1], done.stderr
