"""What a number was measured on: it stands beside every number."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from slimstep import ROOT

LIBRARIES = ("torch", "diffusers", "transformers", "open-clip-torch", "accelerate")


def environment() -> dict:
    """Hardware, library versions, processes, threads, load, and the commit where there is one."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or cpu_name(),
        "cuda": torch.version.cuda if gpu else None,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "commit": commit(),
        **{name: version(name) for name in LIBRARIES},
    }


def cpu_name() -> str:
    """The processor's name and the number of its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores"


def commit() -> str | None:
    """The checkout's commit, with a plus where files differ from it; an installed copy has none."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
