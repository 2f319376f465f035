"""Kills at random moments change nothing of what a run leaves: the campaign of scripts/chaos.py on the tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.chaos import SMALL

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 12), (2, 8)])
def test_killed_runs_leave_what_a_quiet_run_leaves(tmp_path, tiny_model, processes, kills):
    job = [sys.executable, str(ROOT / "scripts/chaos.py"), f"--folder={tmp_path}", f"--kills={kills}", "--seed=1",
           f"--processes={processes}", "--signal=both", "--", *SMALL, *tiny_model]  # fmt: skip
    done = subprocess.run(job, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills, {kills} resumed, all equal" in done.stdout
