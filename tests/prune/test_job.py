"""The pruning job from a pipeline folder to an export, on a random model: what it leaves, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "train.steps=3", "train.batch_size=4", "recovery.train.steps=3", "recovery.train.batch_size=4",
    "data.resolution=16", "scoring.prompts=4", "scoring.steps=2", "scoring.batch_size=8",
    "eval.prompts=4", "eval.steps=2", "eval.pictures=2", "latency.iterations=3", "latency.additive_samples=2",
]  # fmt: skip


def run(*overrides):
    size = [] if "data=imagefolder" in overrides else ["data.pairs.size=16"]
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *size, *overrides]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def model(tiny_pipeline_folder, tiny_clip_folder):
    """Overrides that put the random model and scorer in the places of the shipped ones."""
    return ["model=path", f"model.name_or_path={tiny_pipeline_folder}", f"scorer.model=local-dir:{tiny_clip_folder}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    root = tmp_path_factory.mktemp("runs")
    done = run("+experiment=prune_unet", f"root={root}", "search.target_fraction=0.9", *model)
    assert done.returncode in (0, 3), done.stderr
    return root / "prune_unet", done


def test_the_run_holds_what_the_design_says(finished):
    path, _ = finished
    stages = ("round-00", "round-01")
    products = [f"{s}/{name}.json" for s in stages for name in ("latency", "scores", "decision")]
    for name in ("config.yaml", "metrics.jsonl", *products, "evaluation.json", "report.html", "export/verdict.json"):
        assert (path / name).is_file(), name


def test_a_finished_run_makes_nothing_anew(finished, model):
    path, first = finished
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*.json")}
    again = run("+experiment=prune_unet", f"root={path.parent}", "search.target_fraction=0.9", *model)
    assert again.returncode == first.returncode, again.stderr
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*.json")} == before


def test_another_configuration_is_refused_by_name(finished, model):
    path, _ = finished
    refused = run("+experiment=prune_unet", f"root={path.parent}", "seed=1", *model)
    assert refused.returncode == 1
    assert "seed: 0 there, 1 now" in refused.stderr and "Traceback" not in refused.stderr


def test_the_decision_is_reproduced_by_hand(finished, tmp_path, model):
    """search=manual with the evolved table goes the same path to the same architecture."""
    path, _ = finished
    decision = path / "round-01/decision.json"
    by_hand = ["search=manual", f"search.method.depths={decision}", f"root={tmp_path}"]
    done = run("+experiment=prune_unet", *by_hand, *model)
    assert done.returncode == 0, done.stderr
    by_hand = json.loads((tmp_path / "prune_unet/round-00/decision.json").read_text())
    assert by_hand["after"] == json.loads(decision.read_text())["after"]


def test_an_unreachable_target_exports_the_best_effort_and_says_so(tmp_path, model):
    done = run("+experiment=prune_unet", "search.target_ms=0.001", "search.rounds=1", f"root={tmp_path}", *model)
    assert done.returncode == 3, done.stderr
    assert "was not reached" in done.stderr
    assert (tmp_path / "prune_unet/export/model_index.json").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+experiment=nothing"], r"Could not find 'experiment/nothing'"),
        (["+experiment=prune_unet", "train.stps=3"], "train has no key 'stps'; did you mean steps?"),
        (["+experiment=prune_unet", "serch=manual"], "has no key 'serch'; did you mean search?"),
        (["+experiment=prune_unet", "train.steps=many"], "train.steps"),
        (["+experiment=prune_unet", "train.schedule=linear"], "train.schedule='linear' is unknown"),
        (["+experiment=prune_unet", "model=path", "model.name_or_path=/nowhere"], "/nowhere"),
        (["+experiment=prune_unet", "data=imagefolder", "data.root=/nowhere"], "/nowhere"),
        (["+experiment=prune_unet", "scorer.model=local-dir:/nowhere"], "/nowhere"),
        (["+experiment=prune_unet", "objective.skip_prob.resnet=1.5"], "objective.skip_prob"),
        (["+experiment=prune_unet", "search=manual", "search.method.remove=[mid]"], "unknown sites ['mid']"),
        (["+experiment=prune_unet", "eval.steps=0"], "steps=0 must be at least 1"),
        (["+experiment=prune_unet", "scoring.steps=many"], "scoring.steps"),
    ],
)
def test_a_mistake_gets_one_line_and_a_non_zero_exit(tmp_path, model, overrides, message):
    failed = run(*model, *overrides, f"root={tmp_path}")
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert failed.returncode == 1 and len(errors) == 1, failed.stderr
    assert message in errors[0] and "Traceback" not in failed.stderr
