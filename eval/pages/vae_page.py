"""The report of a pruned decoder: how near its images are, crops with their errors, and the time it saves."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from slimstep.engine.resolution import printed
from slimstep.eval.pages.figures import MUTED, STUDENT, canvas, show_image, styled
from slimstep.eval.pages.html import Pair, pairs, write_page
from slimstep.eval.pages.runs import read_json
from slimstep.eval.pages.tables import Table
from slimstep.eval.pages.text import count, difference, digits, flatten, overlap_sentence, ratio, score
from slimstep.eval.record import Evaluation, Point, Values, read_evaluation

FORMER = {"teacher": "wide", "pruned": "sliced", "student": "narrow"}  # decoders as earlier versions called them
PREFIXES = {"sampled": "", "real": "real_"}  # of metrics
KINDS = {"sampled": "sampled latents", "real": "latents of real images"}
CROP, AMPLIFIED, SHOWN = 128, 8, 4
# {metric: (its heading, how its mean is shown)}; the third and the fifth are of videos alone.
MEASURES: dict[str, tuple[str, Callable[[Values], str]]] = {
    "psnr": ("PSNR", score),
    "ssim": ("SSIM", lambda measured: f"{measured['mean']:.4f}"),
    "psnr_worst_frame": ("PSNR, worst frame", score),
    "features": ("features", lambda measured: f"{measured['mean']:.4f}"),
    "temporal_error": ("flicker, %", lambda measured: digits(measured["mean"])),
}


def write_vae_report(folder: str | Path, track: Callable[[], None] = lambda: None) -> Path:
    """Makes the page and its pictures anew from what the run has written."""
    folder = Path(folder)
    evaluation = read_evaluation(folder)
    figures = {"nearness": nearness_figure(evaluation)}
    figures |= {f"crops-{kind}": crops_figure(folder, evaluation, kind) for kind in KINDS}
    return write_page(
        folder,
        "vae.html.j2",
        figures,
        track,
        widths=evaluation.facts["widths"],
        has_frames=any("temporal_error" in point.metrics for point in evaluation.points),
        seen=overlap_sentence(evaluation.n, evaluation.seen),
        quality=quality_table(evaluation),
        times=time_table(read_times(folder)["rows"]),
        kinds=KINDS,
        pairs={kind: side_by_side(folder, evaluation, kind) for kind in KINDS},
        facts=flatten({"n": evaluation.n, "n_real": evaluation.facts["n_real"], "protocol": evaluation.protocol,
                       "environment": evaluation.environment}),  # fmt: skip
    )


def vae_table(folder: Path) -> str:
    """Quality, then time, as text for a terminal."""
    quality, time = quality_table(read_evaluation(folder)), time_table(read_times(folder)["rows"])
    return f"{quality.console}\n{time.console}"


def quality_table(evaluation: Evaluation) -> Table:
    """A line per decoder; means over the held-out latents. What no decoder was measured by has no column."""
    of_clip = {"CLIP ± se": lambda p: score(p.clip), "against the teacher's": lambda p: difference(p.versus_reference)}
    columns = {
        "decoder": lambda p: p.model,
        "parameters": lambda p: count(p.facts["parameters"]["decoder"]),
        **(of_clip if evaluation.has_prompts else {}),
    }
    for prefix, words in {"": "sampled", "real_": "real", "image_": "to the real ones"}.items():
        for name, (heading, shown) in MEASURES.items():
            if any(point.metrics.get(f"{prefix}{name}") for point in evaluation.points):
                columns[f"{words}: {heading}"] = partial(measure, f"{prefix}{name}", shown)
    return Table.of(columns, evaluation.points)


def measures(point: Point, prefix: str) -> list[str]:
    """PSNR ± standard error in dB, SSIM, cosine of features, of images."""
    return [measure(f"{prefix}{name}", MEASURES[name][1], point) for name in ("psnr", "ssim", "features")]


def measure(name: str, shown: Callable[[Values], str], point: Point) -> str:
    return shown(measured) if (measured := point.metrics.get(name)) else "–"


def time_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line per measurement; one that did not fit says so."""
    header = ["mode", "latents", "batch", "teacher, ms", "student, ms", "ratio", "quartiles", "FLOP ratio", "of it"]

    def times(row: Mapping[str, Any]) -> list[str]:
        if "skipped" in row:
            return [row["skipped"], *["–"] * 5]
        return [digits(row["ms"]["teacher"]), digits(row["ms"]["student"]), *ratio(row).split(" ", 1),
                f"{row['flop_ratio']:.2f}", f"{row['of_flops']:.0%}"]  # fmt: skip

    cases = [[row["mode"], latents_of(row), str(row["batch"])] for row in rows]
    return Table(header, [[*case, *times(row)] for case, row in zip(cases, rows, strict=True)], labels=3)


def latents_of(row: Mapping[str, Any]) -> str:
    """The size of the latents, and, of videos, how many behind each other were decoded together."""
    size, count = printed(row["latent_size"]), row.get("latent_frames")
    return f"{count} × {size}" if count else size


@styled
def nearness_figure(evaluation: Evaluation) -> Figure:
    """PSNR to the teacher decoder's image, latent by latent: before training and after."""
    figure, (axes,) = canvas(6.4, 3.6)
    pruned = [point for point in evaluation.points if point.metrics.get("psnr")]
    for point, (kind, prefix) in itertools.product(pruned, PREFIXES.items()):
        values = sorted(point.metrics[f"{prefix}psnr"]["per_prompt"])
        share = np.arange(1, len(values) + 1) / len(values)
        colour, line = (STUDENT if point.model == "student" else MUTED), ("-" if kind == "sampled" else ":")
        axes.step(values, share, color=colour, linestyle=line, label=f"{point.model}, {KINDS[kind]}")
    axes.set(xlabel="PSNR to the teacher decoder's image, dB", ylabel="share of latents below", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8)
    return figure


@styled
def crops_figure(folder: Path, evaluation: Evaluation, kind: str) -> Figure:
    """Crops of the first images: real ones, the teacher's, the student's before and after training, and the last one's
    error, amplified."""
    columns = {"real image": folder / "images/real"} if kind == "real" else {}
    columns |= {point.model: picture_folder(folder, point, kind) for point in evaluation.points}
    shown = min(SHOWN, len(list(columns["teacher"].glob("*.png"))))
    height, width = crop(columns["teacher"] / "000.png").shape[:2]  # the frames of a video are one strip
    size = 1.7 * (len(columns) + 1), (1.7 * height / width + 0.05) * shown + 0.2
    figure = Figure(figsize=size, layout="constrained")
    cells = figure.subplots(shown, len(columns) + 1, squeeze=False)
    for i, line in enumerate(cells):
        crops = [crop(path / f"{i:03d}.png") for path in columns.values()]
        error = np.abs(crops[-1].astype(float) - crops[list(columns).index("teacher")].astype(float))
        titles = [*columns, f"its error × {AMPLIFIED}"]
        for axes, title, image in zip(
            line, titles, [*crops, np.clip(AMPLIFIED * error, 0, 255).astype("uint8")], strict=True
        ):
            show_image(axes, image)
            if i == 0:
                axes.set_title(title, fontsize=9)
    return figure


def side_by_side(folder: Path, evaluation: Evaluation, kind: str) -> list[Pair]:
    """Whole images of the teacher's decoder and of the student's, which is the last one."""
    shown = {point.model: sorted(picture_folder(folder, point, kind).glob("*.png"))
             for point in (evaluation.points[0], evaluation.points[-1])}  # fmt: skip
    return pairs(shown, evaluation.shown if kind == "sampled" else (), SHOWN)


def picture_folder(folder: Path, point: Point, kind: str) -> Path:
    """Where a decoder's images lie; earlier versions called decoders otherwise."""
    place = f"steps-{point.steps}-guidance-{point.guidance}" if kind == "sampled" else kind
    here = folder / "images" / point.model / place
    return here if here.exists() else folder / "images" / FORMER[point.model] / kind


def read_times(folder: Path) -> dict[str, Any]:
    """vae_ms.json, with the decoders' names of today."""
    times = read_json(folder / "vae_ms.json")
    names = {old: new for new, old in FORMER.items()}
    for row in times["rows"]:
        row["ms"] = {names.get(name, name): ms for name, ms in row.get("ms", {}).items()}
    return times


def crop(path: Path) -> np.ndarray:
    """The middle of a picture, at its own resolution."""
    image = np.asarray(Image.open(path).convert("RGB"))
    top, left = (max(0, side - CROP) // 2 for side in image.shape[:2])
    return image[top : top + CROP, left : left + CROP]
