"""Finished evaluations, benchmarks, ladders and pipelines tables as the jobs leave them, with made-up numbers."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from slimstep.eval.metrics.compare import mean_and_error, paired_difference
from slimstep.eval.record import former
from slimstep.eval.timing.inference import InferenceConfig
from tests.eval.run_stub import PROMPTS, write

SCORER = {"model": "local-dir:shapes-clip", "weights": "f374cc813b38", "prefix": "", "scale": 100.0}
ENVIRONMENT = {"device": "a CPU, 2 cores", "threads": 1, "torch": "2.15.0"}
N = 16


def scores(shift: float = 0.0, seed: int = 0) -> list[float]:
    """CLIP of N prompts: the same prompts are easy and hard for every model."""
    noise = np.random.default_rng(seed).normal(shift, 0.3, N)
    return (80 + np.random.default_rng(9).normal(0, 4, N) + noise).tolist()


def write_evaluation(folder: Path, models: dict[str, str], clip: dict[tuple[str, int], list[float]], **changes) -> Path:
    """`clip`: {(model, steps): scores}, at guidance scale 2.5. The reference is the first model at its most steps."""
    reference = next(iter(models)), max(steps for _, steps in clip)
    points = []
    for (model, steps), values in clip.items():
        versus = asdict(paired_difference(values, clip[reference], resamples=200))
        points.append({
            "model": model, "steps": steps, "guidance": 2.5, "evaluations": 2 * steps,
            "parameters": {"UNet": 5_500_000, "decoder": 300_000},
            "protocol": {"steps": steps, "guidance_scale": 2.5, "seed": 1, "scheduler": "DDIMScheduler"},
            "clip": {**asdict(mean_and_error(values)), "per_prompt": values}, "preferences": {}, "distribution": None,
            "versus_reference": None if (model, steps) == reference else versus,
            "to_reference": {"psnr": {"mean": 30.0, "se": 1.0}, "features": {"mean": 0.9, "se": 0.1}},
        })  # fmt: skip
        for i in range(len(PROMPTS)):
            path = folder / f"images/{model}/steps-{steps}-guidance-2.5/{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * i, 20 * steps, 90)).save(path)
    write(folder / "evaluation.json", former({
        "models": models, "reference": {"model": reference[0], "steps": reference[1]}, "prompts": "shapes",
        "prompts_hash": "0bd7cd5da5da", "shown": PROMPTS, "n": N, "points": points, "environment": ENVIRONMENT,
        "protocol": {**SCORER, "seed": 1, "inception": None, "preferences": None}, **changes,
    }).as_json())  # fmt: skip
    return folder


def row(ms: float, batch: int = 1, **changes) -> dict:
    """A timed row of any kind."""
    speed = {"ratio": 2.0, "low": 1.9, "high": 2.1, "n": 5}
    return {
        "batch": batch, "cannot": None, "ms": {"median": ms, "p10": 0.9 * ms, "p90": 1.1 * ms, "min": ms, "n": 5},
        "parts_ms": {"UNet": 0.9 * ms, "VAE": 0.1 * ms}, "parts_of_whole": 1.0, "unet_calls": 8,
        "speedup": {"base": speed}, "images_per_s": 1e3 * batch / ms, "memory": None,
        "graphs": {"graphs": 0, "breaks": 0}, "recompiled": 0, **changes,
    }  # fmt: skip


def write_speed(folder: Path, kind: str, models: dict[str, str], rows: list[dict], **changes) -> Path:
    protocol = {"steps": 8, "guidance_scale": 2.5, "clock": "CPU time of one thread", **changes.pop("protocol", {})}
    write(folder / "results.json", {
        "kind": kind, "models": models, "rows": rows, "protocol": protocol, "environment": ENVIRONMENT, **changes,
    })  # fmt: skip
    return folder


def write_benchmark(folder: Path, models: dict[str, str], ms: dict[str, float], setup: str = "", **changes) -> Path:
    """Every model in one setup at batch 1."""
    steps = changes.get("protocol", {}).get("steps", 8)
    rows = [row(time, model=model, steps=steps, name=setup or str(InferenceConfig())) for model, time in ms.items()]
    return write_speed(folder, "benchmark", models, rows, **changes)


def write_cumulative(folder: Path) -> Path:
    speed = {"ratio": 2.5, "low": 2.4, "high": 2.6, "n": 5}
    rows = [
        row(100, name="plain", changes={}, kept=True, speedup={}),
        {"name": "TF32", "batch": 1, "changes": {}, "kept": False, "cannot": "TF32 is a format of CUDA devices"},
        row(40, name="8 steps", changes={"steps": 8}, kept=True, speedup={"first": speed, "before": speed}),
    ]
    return write_speed(folder, "cumulative", {"teacher": "/teacher"}, rows)


def write_pipelines(folder: Path) -> Path:
    tasks = {"txt2img": 20.0, "img2img": 10.0}
    rows = [row(50, task=task, model="teacher", mode="eager", its=its, speedup={}) for task, its in tasks.items()]
    return write_speed(folder, "pipelines", {"teacher": "/teacher"}, rows)
