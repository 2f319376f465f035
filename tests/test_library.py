"""The script of docs/library.py works as it stands, away from the checkout, and is short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "docs/library.py"


def test_the_script_is_short():
    assert len(SCRIPT.read_text().splitlines()) <= 40


@pytest.mark.slow
def test_the_script_prunes_times_distils_and_evaluates(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'student': " in done.stdout and "PairedDifference" in done.stdout
    assert (tmp_path / "export/model_index.json").is_file() and not (tmp_path / "runs").exists()
