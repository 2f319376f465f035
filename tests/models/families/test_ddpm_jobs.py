"""The jobs on a small random DDPM and tiny images: pruned, distilled in steps, ranked and measured without prompts."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

from slimstep.engine.seeding import generator
from tests.jobs import run_job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `model` and `images`."""
    place, draw = tmp_path_factory.mktemp("ddpm"), generator("tiny images")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(place / "model")
    (place / "images").mkdir()
    for i in range(24):
        pixels = torch.randint(256, (8, 8, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place / f"images/{i:02d}.png")
        (place / f"images/{i:02d}.txt").write_text(f"picture {i}")
    return place


def run(experiment: str, place: Path, *overrides: str) -> tuple[Path, str]:
    """The job's folder, and what it printed."""
    data = ["data=imagefolder", f"data.root={place}/images", "data.heldout_fraction=0.3"]
    small = ["train.steps=2", "train.batch_size=4", "eval.prompts=4", "eval.pictures=2", "latency.iterations=3"]
    arguments = [f"+experiment={experiment}", f"model.name_or_path={place}/model", f"root={place}/runs", *data, *small]
    done = run_job(*arguments, f"name={experiment}", *overrides)
    assert done.returncode in (0, 3), done.stderr
    return place / "runs" / experiment, done.stdout


def test_a_ddpm_is_pruned_by_the_error_of_its_images(place):
    changes = ["recovery.train.steps=2", "recovery.train.batch_size=4", "search.rounds=1", "search.target_fraction=0.9",
           "scoring.prompts=4", "scoring.steps=2", "eval.steps=2", "latency.additive_samples=2"]  # fmt: skip
    path, printed = run("prune_ddpm", place, *changes)
    scores = json.loads((path / "round-00/scores.json").read_text())
    assert scores["protocol"]["metric"] == "image_error" and scores["base"]["clip"] == 0
    assert all(block["delta_clip"] >= 0 for block in scores["sites"].values())
    decision = json.loads((path / "round-00/decision.json").read_text())
    removed = [block for block, repeats in decision["after"].items() if repeats == 0]
    student = json.loads((path / "evaluation.json").read_text())["points"][-1]
    assert removed and student["model"] == "student" and "clip" not in student["metrics"]
    assert student["metrics"]["fd"]["fd"] > 0 and student["metrics"]["fd"]["features"] == "8×8 pixels"
    assert "image_error to the reference" in printed and (path / "report.html").is_file()
    assert "Fréchet distance" in (path / "export/README.md").read_text()
    is_stock = json.loads((path / "export/export_report.json").read_text())["is_stock"]
    exported = DiffusionPipeline.from_pretrained(path / "export", trust_remote_code=not is_stock)
    assert exported(num_inference_steps=2).images[0].size == (8, 8)


def test_ddpms_are_evaluated_without_prompts(place):
    """The teacher at two numbers of steps: nearness to the first, the distance to real images, and no CLIP score."""
    models = f"models={{teacher: {{path: {place}/model, steps: [4, 2]}}}}"
    changes = ["scorer=none", "curves.guidance=[1]", "model=path", "evaluation.real_images=4", models]
    path, printed = run("evaluate", place, *changes)
    teacher, fewer = json.loads((path / "evaluation.json").read_text())["points"]
    assert "clip" not in teacher["metrics"] and teacher["metrics"]["image_error"] is None
    assert fewer["metrics"]["image_error"]["mean"] > 0 and fewer["metrics"]["fd"]["features"] == "8×8 pixels"
    assert json.loads(printed.splitlines()[-1])["run"] == str(path) and (path / "report.html").is_file()


def test_a_ddpm_is_distilled_in_steps(place):
    conversion = ["v_prediction.train.steps=2", "v_prediction.train.batch_size=4"]
    changes = ["distillation.steps=[4,2]", "curves.steps=[2]", *conversion]
    path, printed = run("distill_ddpm", place, *changes)
    evaluation = json.loads((path / "evaluation.json").read_text())
    models = [point["model"] for point in evaluation["points"]]
    assert models == ["teacher", "teacher", "teacher-dpm", "teacher-v", "steps-2"] and "latent_error" in printed
    exported = DiffusionPipeline.from_pretrained(path / "steps-2/export")
    assert type(exported.unet) is UNet2DModel and exported.scheduler.config.prediction_type == "v_prediction"
    assert exported(num_inference_steps=2).images[0].size == (8, 8)


def test_the_plain_experiment_says_what_an_unconditional_model_wants(place):
    done = run_job("+experiment=prune_unet", "model=path", "scorer=shapes", f"model.name_or_path={place}/model",
                   "data=imagefolder", f"data.root={place}/images", "name=plain", f"root={place}/runs")  # fmt: skip
    assert done.returncode == 1 and "DDPMPipeline has no guidance; set 1" in done.stderr, done.stderr
