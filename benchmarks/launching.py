"""What benchmarks of jobs share: a job as a process, or several of them, in this terminal."""

import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def run_job(experiment: str, overrides: Sequence[str], processes: int = 1, fine: Collection[int] = (0,)) -> None:
    """Runs or continues an experiment. Leaves with one line where its exit code is none of the `fine` ones."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(REPOSITORY / "train.py"), f"+experiment={experiment}", *overrides]
    print("$", " ".join(command), flush=True)
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if not os.path.exists("/dev/nvidia0") else {}
    if (code := subprocess.run(command, env={**os.environ, **on_cpu}).returncode) not in fine:
        name = next(word for word in overrides if word.startswith("name="))
        sys.exit(f"{name} failed with exit code {code}; the same command continues")
