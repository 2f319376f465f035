"""The job on real photographs: from a folder of captioned images to the report, with the bundled model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import run_job

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "train.steps=10", "train.batch_size=8", "recovery.train.steps=10", "recovery.train.batch_size=8",
    "scoring.prompts=4", "scoring.steps=2", "eval.prompts=4", "eval.steps=2", "eval.pictures=4",
    "latency.iterations=3", "latency.additive_samples=2", "search.rounds=1",
]  # fmt: skip


@pytest.mark.slow
def test_the_shipped_model_is_pruned_on_a_folder_of_captioned_photographs(tmp_path):
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    photos = tmp_path / "photos"
    made = [sys.executable, str(ROOT / "scripts/make_photo_folder.py"), "--root", str(photos), "--size", "64"]
    subprocess.run(made, check=True, capture_output=True)
    job = [
        "+experiment=prune_unet",
        "data=imagefolder",
        f"data.root={photos}",
        "data.heldout_fraction=0.2",
        f"root={tmp_path}/runs",
        "name=photos",
        "model=shapes",
        "scorer=shapes",
        "scorer.force=true",
        *SMALL,
    ]
    done = run_job(*job)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/photos"
    assert "cannot evaluate these data" in (run / "report.html").read_text()
    evaluation = json.loads((run / "evaluation.json").read_text())
    captions = {json.loads(line)["text"] for line in (photos / "metadata.jsonl").read_text().splitlines()}
    assert set(evaluation["shown"]) <= captions
    ms = evaluation["facts"]["ms"]
    assert ms["student"] <= 0.8 * ms["teacher"]
    assert (run / "report.html").is_file() and (run / "export/model_index.json").is_file()
