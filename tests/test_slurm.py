"""A job in a real Slurm queue: sent with Hydra's submitit launcher, preempted, requeued, and equal in the end."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.chaos import differences

ROOT = Path(__file__).resolve().parents[1]
JOB = [
    "+experiment=prune_unet", "search=manual", "data.pairs.size=32", "train.steps=400", "train.batch_size=4",
    "train.checkpoint_every=50", "recovery.train.steps=3", "recovery.train.batch_size=4", "eval.prompts=4",
    "scoring.prompts=4", "eval.steps=2", "eval.pictures=2", "latency.iterations=3", "latency.additive_samples=2",
]  # fmt: skip
QUEUE = ["-m", "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=30", "hydra.launcher.cpus_per_task=1",
         "hydra.launcher.tasks_per_node=2"]  # fmt: skip


@pytest.fixture(scope="module")
def slurm():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install slimstep[slurm]")
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm answers here: sinfo fails")


def wait_for(happened, seconds=600):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.5)


@pytest.mark.slow
def test_a_preempted_job_goes_back_into_the_queue_and_ends_as_an_undisturbed_one(slurm, tmp_path, tiny_model):
    table = tmp_path / "table/latency_table/latency.json"
    for job in (["+experiment=latency_table", "latency.iterations=3", "latency.additive_samples=2"], None):
        root = tmp_path / ("quiet" if job is None else "table")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if job is None else []
        job = job or [*JOB, f"latency.table={table}", f"data.cache.folder={tmp_path / 'cache'}"]
        command = [
            sys.executable,
            *launcher,
            str(ROOT / "train.py"),
            "name=prune_unet",
            *job,
            *tiny_model,
            f"root={root}",
        ]
        subprocess.run(command, check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    queued = [
        sys.executable,
        str(ROOT / "train.py"),
        "name=prune_unet",
        *QUEUE,
        *job,
        *tiny_model,
        f"root={tmp_path / 'queued'}",
    ]
    path = tmp_path / "queued/prune_unet"
    sender = subprocess.Popen(queued, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    try:
        wait_for((path / "round-00/checkpoints/step-00000050").exists)
        (folder,) = (tmp_path / "queued/.submitit").glob("[0-9]*")
        subprocess.run(["scancel", "--signal=USR2", folder.name], check=True)
        wait_for(lambda: "requeued" in states(folder.name))
        assert not (path / "report.html").exists()
        subprocess.run(["scontrol", "update", f"JobId={folder.name}", "StartTime=now"], check=True)
        wait_for((path / "report.html").exists)
    finally:
        sender.kill()
    assert differences(tmp_path / "quiet/prune_unet", path) == []


def states(job: str) -> str:
    text = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    return "requeued" if "Restarts=1" in text else text
