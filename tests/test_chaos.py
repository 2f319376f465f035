"""Kills at random moments change nothing of what a run leaves: the campaign of scripts/chaos.py on the tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Accumulation, a worker in the loader, and 64 pairs in batches of 8: four epoch ends in 24 steps.
JOB = [
    "+experiment=prune_unet", "search.rounds=1", "search.target_fraction=0.8", "data.pairs.size=64",
    "train.steps=24", "train.batch_size=4", "train.checkpoint_every=5", "train.accumulation=2", "train.workers=1",
    "recovery.train.steps=12", "recovery.train.batch_size=4", "recovery.train.checkpoint_every=5",
    "scoring.prompts=4", "scoring.steps=2", "scoring.batch_size=8", "eval.prompts=4", "eval.steps=2", "eval.pictures=2",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 12), (2, 8)])
def test_killed_runs_leave_what_a_quiet_run_leaves(tmp_path, tiny_model, processes, kills):
    job = [sys.executable, str(ROOT / "scripts/chaos.py"), f"--folder={tmp_path}", f"--kills={kills}", "--seed=1",
           f"--processes={processes}", "--signal=both", "--", *JOB, *tiny_model]  # fmt: skip
    done = subprocess.run(job, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills, {kills} resumed, all equal" in done.stdout
