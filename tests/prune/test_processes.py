"""Scores and judgements do not depend on how many processes share the work: equal bit for bit on the CPU."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.prune.test_job import ROOT, SMALL


def launch(processes, root, *overrides):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    job = [str(ROOT / "train.py"), *SMALL, "data.pairs.size=16", f"root={root}", *overrides]
    command = [sys.executable, *launcher, *job]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert done.returncode in (0, 3), done.stderr
    return root / "prune_unet"


@pytest.mark.slow
def test_two_and_three_processes_score_as_one_does(tmp_path, tiny_model):
    job = ["+experiment=prune_unet", "search.rounds=1", *tiny_model]
    one = launch(1, tmp_path / "one", *job)
    for processes in (2, 3):
        root = tmp_path / str(processes)
        (root / "prune_unet/round-00").mkdir(parents=True)
        shutil.copy(one / "round-00/weights.safetensors", root / "prune_unet/round-00")  # the same network to score
        several = launch(processes, root, *job)
        for product in ("round-00/scores.json", "judged/teacher.json"):
            assert (several / product).read_bytes() == (one / product).read_bytes(), (processes, product)
