"""A run directory as the pruning job leaves it, with made-up numbers: SD-1.5's 38 blocks, two rounds, a few images."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from slimstep.eval.metrics.compare import mean_and_error, paired_difference
from slimstep.eval.record import former

PROTOCOL = {
    "model": "local-dir:assets/shapes-clip", "pretrained": None, "prefix": "", "scale": 100.0,
    "resize": {"size": [64, 64], "mode": "shortest", "interpolation": "bicubic"},
    "steps": 8, "guidance_scale": 2.5, "seed": 0,
}  # fmt: skip
PROMPTS = [
    f"{size} {colour} circle above a blue square" for size in ("a large", "a small") for colour in ("red", "green")
]


def sd15_blocks() -> list[str]:
    """The blocks of SD-1.5's UNet in order of execution."""
    blocks = []
    for level in range(4):
        for i in range(2):
            blocks += [f"down_blocks.{level}.resnets.{i}"] + [f"down_blocks.{level}.attentions.{i}"] * (level < 3)
    blocks += ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    for level in range(4):
        for i in range(3):
            blocks += [f"up_blocks.{level}.resnets.{i}"] + [f"up_blocks.{level}.attentions.{i}"] * (level > 0)
    return blocks


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_run(folder: Path, seed: int = 0, finished: bool = True, n: int = 64) -> Path:
    """A finished run, or one that was stopped before its evaluation."""
    draw, depths, ms_now = np.random.default_rng(seed), {}, 10.0
    for number in range(2):
        kept = [block for block in sd15_blocks() if depths.get(block, 1)]
        ms = {block: float(draw.uniform(0.05, 0.45)) for block in kept}
        loss = {block: float(draw.gamma(0.6, 1.5) - 0.15) for block in kept}
        stage = folder / f"round-{number:02d}"
        removed_ms = [{"removed": kept[:k], "predicted_ms": ms_now - 0.2 * k, "measured_ms": ms_now - 0.2 * k
                       + float(draw.normal(0, 0.15))} for k in range(2, 22)]  # fmt: skip
        write(stage / "latency.json", {
            "method": "in_place_hooks", "device": "cpu", "dtype": "float32", "batch": 2, "latent_size": 8,
            "mode": "eager", "threads": 1, "torch": "2.15.0", "full_ms": ms_now,
            "sites": {block: {"ms": x} for block, x in ms.items()},
            "additive_error": {"n": 20, "median": 0.021, "p95": 0.06}, "samples": removed_ms,
        })  # fmt: skip
        write(stage / "scores.json", {
            "protocol": {**PROTOCOL, "prompts_hash": "0123456789ab", "n": n},
            "base": {"clip": 31.0, "se": 0.2}, "rank_agreement_of_halves": 0.93,
            "sites": {s: {"delta_clip": x, "se": 0.05 + 0.1 * abs(x), "n": n, "psnr": 20.0} for s, x in loss.items()},
        })  # fmt: skip
        cheapest = sorted(kept, key=lambda block: loss[block] / ms[block])[:6]
        actions = []
        for block in cheapest:
            ms_now -= ms[block]
            actions.append({"action": "remove", "site": block, "delta_clip": loss[block], "se": 0.1,
                            "saved_ms": ms[block], "value": loss[block] / ms[block],
                            "why": f"{loss[block] / ms[block]:.2f} CLIP per ms",
                            "predicted_ms": ms_now})  # fmt: skip
        before, depths = dict(depths), {**depths, **dict.fromkeys(cheapest, 0)}
        if number == 1:
            best = max(kept, key=lambda block: loss[block] / ms[block])
            depths[best] = 2
            ms_now += ms[best]
            actions.append({"action": "copy", "site": best, "delta_clip": loss[best], "se": 0.1, "saved_ms": ms[best],
                            "value": loss[best] / ms[best], "why": "valuable", "predicted_ms": ms_now})  # fmt: skip
        write(stage / "decision.json", {
            "before": before, "after": depths, "actions": actions, "target_ms": 7.5, "predicted_ms": ms_now,
            "measured_ms": ms_now + 0.1, "teacher_ms": 10.0,
        })  # fmt: skip
    (folder / "config.yaml").write_text("name: prune_unet\nseed: 0\n")
    if finished:
        write_outcome(folder, draw, ms_now, n)
    return folder


def write_outcome(folder: Path, draw: np.random.Generator, student_ms: float, n: int) -> None:
    """evaluation.json, images and the report of the export."""
    teacher = draw.normal(31, 2.5, size=n)
    rows = {
        "teacher": (0.0, 2_090_000, 0.42, 10.0),
        "round-00": (-1.1, 1_830_000, 0.38, 8.6),
        "round-01": (-2.2, 1_600_000, 0.33, student_ms),
        "student": (-0.3, 1_600_000, 0.33, student_ms),
    }
    models = []
    for name, (shift, parameters, gflops, ms) in rows.items():
        scores = teacher + (draw.normal(shift, 0.8, size=n) if name != "teacher" else 0)
        mean, versus = mean_and_error(scores), paired_difference(scores, teacher, resamples=200)
        against = {key: getattr(versus, key) for key in ("mean", "se", "low", "high")}
        models.append({
            "name": name, "parameters": parameters, "gflops": gflops, "ms": ms,
            "clip": {"mean": mean.mean, "se": mean.se, "per_prompt": scores.tolist()},
            "psnr_to_teacher": None if name == "teacher" else 18.5 + shift,
            "versus_teacher": None if name == "teacher" else against,
        })  # fmt: skip
        for i in range(len(PROMPTS)):
            path = folder / "images" / name / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, size=(16, 16, 3), dtype=np.uint8)).save(path)
    value = {"prompts_hash": "ba9876543210", "n": n, "protocol": {**PROTOCOL, "steps": 16, "seed": 1}, "models": models}
    write(folder / "evaluation.json", replace(former(value), shown=PROMPTS).as_json())
    write(folder / "export" / "export_report.json", {
        "is_stock": False, "obstacles": ["up_blocks.1.attentions.2 is removed, its neighbours are not"],
        "load": "DiffusionPipeline.from_pretrained('export', trust_remote_code=True)",
    })  # fmt: skip
