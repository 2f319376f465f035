"""The jobs on small random pipelines of every other transformer: pruned and distilled in steps, from a folder to an
export."""

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from scripts.random_transformers import (
    small_flux_pipeline,
    small_pixart_pipeline,
    small_qwen_image_pipeline,
    small_sana_pipeline,
)
from tests.jobs import run_job
from tests.tiny import write_tiny_clip

pytestmark = pytest.mark.slow  # some 30 s of one core for each of them
PIPELINES = {"PixArt": small_pixart_pipeline, "FLUX": small_flux_pipeline, "Sana": small_sana_pipeline,
             "Qwen-Image": small_qwen_image_pipeline}  # fmt: skip
UNGUIDED = ["eval.guidance_scale=1", "scoring.guidance_scale=1"]  # FLUX schnell, which has no guidance
UNGUIDED_STEPS = ["curves.guidance=[1.0]", "eval.guidance_scale=1", "objective.guided_share=0"]


@pytest.fixture(scope="module", params=PIPELINES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def place(family, tmp_path_factory) -> Path:
    """A folder with `model` and `clip`."""
    place = tmp_path_factory.mktemp("transformer")
    PIPELINES[family]().save_pretrained(place / "model")
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


def sides(family: str) -> int:
    return 32 if family == "Sana" else 16


def stock_pipeline(folder: Path, family: str) -> DiffusionPipeline:
    """Loaded without any flag; it has drawn an image."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options = {"use_resolution_binning": False} if family in ("PixArt", "Sana") else {}
    size = dict.fromkeys(("height", "width"), sides(family))
    assert pipeline("a b", num_inference_steps=2, **size, **options).images[0].size == (sides(family),) * 2
    return pipeline


def test_a_transformer_is_pruned(family, place):
    own = ["recovery.train.steps=2", "recovery.train.batch_size=4", "search.rounds=1", "search.target_fraction=0.7",
           "scoring.prompts=4", "scoring.steps=2", "latency.additive_samples=2"]  # fmt: skip
    own += UNGUIDED if family == "FLUX" else []
    path = run("prune_transformer", place, f"data.resolution={sides(family)}", *own)
    decision = json.loads((path / "round-00/decision.json").read_text())
    removed = [block for block, repeats in decision["after"].items() if repeats == 0]
    assert removed and json.loads((path / "export/export_report.json").read_text())["is_stock"]
    before = stock_pipeline(place / "model", family).transformer
    after = stock_pipeline(path / "export", family).transformer
    assert type(after) is type(before) and count(before) - count(after) == len(removed)


def count(network) -> int:
    return network.config.num_layers + network.config.get("num_single_layers", 0)


def test_a_transformer_is_distilled_in_steps(family, place):
    own = ["distillation.steps=[8,4,2]", "curves.steps=[2]"]
    own += UNGUIDED_STEPS if family == "FLUX" else ["curves.guidance=[3.0]"]
    path = run("distill_steps", place, f"data.resolution={sides(family)}", *own)
    names = [point["model"] for point in json.loads((path / "evaluation.json").read_text())["points"]]
    assert names[0] == "teacher" and names[-2:] == ["steps-4", "steps-2"]
    card = (path / "steps-2/export/README.md").read_text()
    assert "VAE decoder: as the teacher's." in card and ("true_cfg_scale=" in card) == (family == "Qwen-Image")
    scheduler = type(stock_pipeline(path / "steps-2/export", family).scheduler).__name__
    assert scheduler == ("DDIMScheduler" if family == "PixArt" else "FlowMatchEulerDiscreteScheduler")
