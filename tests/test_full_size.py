"""SD-1.5 at its full size takes real steps of every training in less than 20 GB of main memory, at 64 pixels."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT_GB = 20


@pytest.mark.huge
def test_every_training_of_sd15_fits(tmp_path):
    free_gb = psutil.virtual_memory().available / 1e9
    if free_gb < LIMIT_GB:
        pytest.skip(f"{free_gb:.0f} GB of memory are free, {LIMIT_GB} may be needed")
    command = [sys.executable, str(ROOT / "benchmarks/training_speed.py"), "--size", "sd15", "--resolution", "64",
               "--optimizer", "adafactor", "--ema-decay", "0", "--steps", "2", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["part"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert set(rows) == {"stochastic_depth", "scoring", "recovery", "steps", "decoder"}
    for part, row in rows.items():
        assert not row.get("cannot"), (part, row["cannot"])
        assert row["peak_gb"] < LIMIT_GB and row["samples_per_second"] > 0, (part, row)
