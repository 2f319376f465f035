"""Packages of small models, and what they draw in a process of their own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimstep.eval.package_job import unit_noises
from slimstep.eval.packaging.formats import write_package
from slimstep.eval.packaging.package import package_of
from slimstep.eval.packaging.sizes import sizes_from
from slimstep.eval.sampling import Sampler
from slimstep.models.pipeline import load_pipeline

PROMPT = "A red  circle"
# A new process in which none of these can be imported.
ALONE = """
import runpy, sys
sys.modules.update(dict.fromkeys({without!r}))
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def drawn_alone(folder: Path, noise: np.ndarray, *options: str, without: tuple[str, ...] = ()) -> np.ndarray:
    """The pixels of a package's own program in a process without diffusers, transformers and slimstep."""
    np.save(folder / "noise.npy", noise)
    argv = [str(folder / "run_package.py"), PROMPT, "--noise", str(folder / "noise.npy"), "--pixels",
            str(folder / "pixels.npy"), "--out", str(folder / "image.png"), *options]  # fmt: skip
    code = ALONE.format(without=("diffusers", "transformers", "slimstep", *without), argv=argv)
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == len(noise)
    return np.load(folder / "pixels.npy")


def drawn_here(sampler: Sampler, count: int) -> np.ndarray:
    cond, network = sampler.conditions([PROMPT], [0]), sampler.network
    return torch.cat([sampler.pixels(sampler.latents_at(network, cond, [i])) for i in range(count)]).numpy()


def noises(sampler: Sampler, count: int, manifest: dict) -> np.ndarray:
    drawn = len(manifest["samplers"][str(sampler.steps)]["latents"]["noises"])
    return np.stack([unit_noises(sampler, i, drawn) for i in range(count)])


def packaged(
    pipeline, folder: Path, steps: int, guidance: float, format: str = "onnx", batch: int = 1,
    sizes: Sequence[str] = (), weights: str = "inside", **loading: Any,
) -> Sampler:  # fmt: skip
    """Writes a package of what was saved and loaded; its sampler."""
    pipeline.save_pretrained(folder / "model")
    sampler = Sampler(load_pipeline(folder / "model", **loading), steps, guidance, seed=1)
    (folder / "package").mkdir()
    package = package_of(sampler, [steps], batch, [sizes_from(size) for size in sizes], weights)
    write_package(package, format, folder / "package")
    return sampler
