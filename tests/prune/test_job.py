"""The pruning job from a pipeline folder to an export, on a random model: what it leaves, and what it refuses."""

import json
import shutil

import pytest

from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from tests.jobs import run_job
from tests.tiny import small_unet

SMALL = [
    "train.steps=3", "train.batch_size=4", "recovery.train.steps=3", "recovery.train.batch_size=4",
    "scoring.prompts=4", "scoring.steps=2", "scoring.batch_size=8",
    "eval.prompts=4", "eval.steps=2", "eval.pictures=2", "latency.iterations=3", "latency.additive_samples=2",
]  # fmt: skip


def run(*overrides):
    size = [] if "data=imagefolder" in overrides else ["data.pairs.size=16"]
    return run_job("name=prune_unet", *SMALL, *size, *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("runs")
    done = run("+experiment=prune_unet", f"root={root}", "search.target_fraction=0.9", *tiny_model)
    assert done.returncode in (0, 3), done.stderr
    return root / "prune_unet", done


def test_the_run_holds_what_the_design_says(finished):
    path, _ = finished
    stages = ("round-00", "round-01")
    artifacts = [f"{s}/{name}.json" for s in stages for name in ("latency", "scores", "decision")]
    ends = ("round-00/budgets.json", "scorer_check.json", "evaluation.json", "report.html", "export/export_report.json")
    for name in ("config.yaml", "metrics.jsonl", *artifacts, *ends):
        assert (path / name).is_file(), name
    page = (path / "report.html").read_text()
    assert "None of the 4 prompts is among the captions that were trained on." in page
    assert "cannot evaluate these data" in page.partition("<h1>")[0]  # a random scorer, with scorer.force
    assert "CLIP lost" in page and "ΔCLIP" not in page
    assert "What every change costs and saves" in page and "Other budgets" in page


def test_a_finished_run_makes_nothing_anew(finished, tiny_model):
    path, first = finished
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*.json")}
    again = run("+experiment=prune_unet", f"root={path.parent}", "search.target_fraction=0.9", *tiny_model)
    assert again.returncode == first.returncode, again.stderr
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*.json")} == before


def test_another_configuration_is_refused_by_name(finished, tiny_model):
    path, _ = finished
    refused = run("+experiment=prune_unet", f"root={path.parent}", "seed=1", *tiny_model)
    assert refused.returncode == 1
    assert "seed: 0 there, 1 now" in refused.stderr and "Traceback" not in refused.stderr


def test_the_decision_is_reproduced_by_hand(finished, tmp_path, tiny_model):
    """search=manual with the evolved table goes the same path to the same architecture."""
    path, _ = finished
    decision = path / "round-01/decision.json"
    by_hand = ["search=manual", f"search.method.architecture={decision}", f"root={tmp_path}"]
    done = run("+experiment=prune_unet", *by_hand, *tiny_model)
    assert done.returncode == 0, done.stderr
    by_hand = json.loads((tmp_path / "prune_unet/round-00/decision.json").read_text())
    assert by_hand["after"] == json.loads(decision.read_text())["after"]


@pytest.mark.slow
def test_an_unreachable_target_exports_the_best_effort_and_says_so(tmp_path, tiny_model):
    done = run("+experiment=prune_unet", "search.target_ms=0.001", "search.rounds=1", f"root={tmp_path}", *tiny_model)
    assert done.returncode == 3, done.stderr
    assert "was not reached" in done.stderr
    assert (tmp_path / "prune_unet/export/model_index.json").is_file()


def test_a_plan_tells_what_is_done_and_writes_nothing(finished, tmp_path, tiny_model):
    path, _ = finished
    job = ["+experiment=prune_unet", "search.target_fraction=0.9", "plan=true", *tiny_model]
    new, done = run(*job, f"root={tmp_path}"), run(*job, f"root={path.parent}")
    assert new.returncode == done.returncode == 0, new.stderr + done.stderr
    assert list(tmp_path.iterdir()) == []
    scores = next(line for line in new.stdout.splitlines() if "round-00/scores.json" in line)
    assert "to do" in scores and "52 images (12 removals)" in scores and "208" in scores  # (1 + 12)·4, 2 steps, guided
    assert "| done" not in new.stdout and "| to do" not in done.stdout


def test_a_tampered_export_is_refused_and_a_missing_one_made_again(finished, tiny_model):
    path, _ = finished
    job = ["+experiment=prune_unet", f"root={path.parent}", "search.target_fraction=0.9", *tiny_model]
    weights = path / "export/unet/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    refused = run(*job)
    assert refused.returncode == 1 and "export is not what was written: unet/diffusion" in refused.stderr
    shutil.rmtree(path / "export")
    assert run(*job).returncode in (0, 3) and weights.read_bytes() == whole


def test_decisions_follow_a_table_made_elsewhere(tmp_path, tiny_model):
    """As from a phone: one block costs all the time, so it is the one that goes; the prediction is exact."""
    blocks = {block: {"ms": 0.0} for block in PrunableUNet2DConditionModel.from_unet(small_unet()).blocks}
    blocks["mid_block.attentions.0"]["ms"] = 5.0
    (tmp_path / "latency.json").write_text(json.dumps({"full_ms": 10.0, "sites": blocks}))
    table = ["+experiment=prune_unet", "search.rounds=1", f"latency.table={tmp_path / 'latency.json'}"]
    done = run(*table, "search.target_fraction=0.6", f"root={tmp_path}", *tiny_model)
    assert done.returncode == 0, done.stderr
    decision = json.loads((tmp_path / "prune_unet/round-00/decision.json").read_text())
    assert decision["after"] == {"mid_block.attentions.0": 0}
    assert (decision["teacher_ms"], decision["measured_ms"], decision["clock"]) == (10.0, 5.0, "latency.table")
