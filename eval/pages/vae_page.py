"""The report of a narrow decoder: how near its images are, crops with their errors, and the time it saves."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from slimstep.engine.files import write_text
from slimstep.eval.pages.cautions import cautions
from slimstep.eval.pages.figures import MUTED, STUDENT, canvas, save_figures, styled, themed
from slimstep.eval.pages.html import render
from slimstep.eval.pages.runs import read_json
from slimstep.eval.pages.tables import console_table
from slimstep.eval.pages.text import count, digits, flatten, overlap_sentence

Evaluation = Mapping[str, Any]
KINDS = {"sampled": "sampled latents", "real": "latents of real images"}
CROP, AMPLIFIED, SHOWN = 128, 8, 4
HEADER = ["decoder", "parameters", "CLIP ± se", "against the wide one", "sampled: PSNR", "SSIM", "features",
          "real: PSNR", "SSIM", "features", "to the real image: PSNR", "SSIM", "features"]  # fmt: skip
TIME_HEADER = ["mode", "latents", "batch", "wide, ms", "narrow, ms", "ratio", "quartiles", "FLOP ratio", "of it"]


def write_vae_report(folder: str | Path, track: Callable[[], None] = lambda: None) -> Path:
    """Makes `folder`/report.html and `folder`/report/*.png anew from what the run has written.

    `track` is called when the pictures are there; the page, which says that all is done, comes last.
    """
    folder = Path(folder)
    evaluation, times = read_json(folder / "evaluation.json"), read_json(folder / "vae_ms.json")
    figures = {"nearness": nearness_figure(evaluation)}
    figures |= {f"crops-{kind}": crops_figure(folder, evaluation, kind) for kind in KINDS}
    save_figures(folder / "report", figures)
    track()
    page = render(
        "vae.html.j2",
        cautions=cautions(folder),
        name=folder.name,
        widths=evaluation["widths"],
        seen=overlap_sentence(evaluation),
        header=HEADER,
        rows=quality_rows(evaluation),
        time_header=TIME_HEADER,
        time_rows=time_rows(times["rows"]),
        kinds=KINDS,
        figures={name: Markup(themed(figure, name)) for name, figure in figures.items()},
        facts=flatten({key: evaluation[key] for key in ("n", "n_real", "protocol", "environment")}),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def vae_table(folder: Path) -> str:
    """Quality, then time, as text for a terminal."""
    evaluation, times = read_json(folder / "evaluation.json"), read_json(folder / "vae_ms.json")
    quality, time = quality_rows(evaluation), time_rows(times["rows"])
    return f"{console_table(HEADER, quality)}\n{console_table(TIME_HEADER, time, labels=3)}"


def quality_rows(evaluation: Evaluation) -> list[list[str]]:
    """A line per decoder; means over the held-out latents."""
    rows = []
    for decoder in evaluation["decoders"]:
        near, d = decoder["nearness"], decoder["versus_wide"]
        versus = "–" if d is None else f"{d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]".replace("-", "−")
        clip = decoder["clip"]
        rows.append([
            decoder["name"], count(decoder["parameters"]), f"{clip['mean']:.2f} ± {clip['se']:.2f}", versus,
            *measures(near["sampled_to_wide"]), *measures(near["real_to_wide"]), *measures(near["real_to_image"]),
        ])  # fmt: skip
    return rows


def measures(near: Mapping[str, Any] | None) -> list[str]:
    """PSNR ± standard error in dB, SSIM, cosine of features."""
    if near is None:
        return ["–"] * 3
    psnr, ssim, features = near["psnr"], near["ssim"], near["features"]
    return [f"{psnr['mean']:.2f} ± {psnr['se']:.2f}", f"{ssim['mean']:.4f}", f"{features['mean']:.4f}"]


def time_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line per measurement; one that did not fit says so."""
    return [
        [row["mode"], f"{row['latent_size']}×{row['latent_size']}", str(row["batch"]), row["skipped"], *["–"] * 5]
        if "skipped" in row else
        [row["mode"], f"{row['latent_size']}×{row['latent_size']}", str(row["batch"]), digits(row["ms"]["wide"]),
         digits(row["ms"]["narrow"]), f"{row['ratio']:.2f}", f"[{row['low']:.2f}, {row['high']:.2f}]",
         f"{row['flop_ratio']:.2f}", f"{row['of_flops']:.0%}"]
        for row in rows
    ]  # fmt: skip


@styled
def nearness_figure(evaluation: Evaluation) -> Figure:
    """PSNR to the wide decoder's image, latent by latent: before training and after."""
    figure, (axes,) = canvas(6.4, 3.6)
    narrow = [decoder for decoder in evaluation["decoders"] if decoder["nearness"]["sampled_to_wide"]]
    lines = [(d, kind) for d in narrow for kind in KINDS]
    for decoder, kind in lines:
        values = sorted(decoder["nearness"][f"{kind}_to_wide"]["psnr"]["per_item"])
        share = np.arange(1, len(values) + 1) / len(values)
        colour, line = (STUDENT if decoder["name"] == "narrow" else MUTED), ("-" if kind == "sampled" else ":")
        axes.step(values, share, color=colour, linestyle=line, label=f"{decoder['name']}, {KINDS[kind]}")
    axes.set(xlabel="PSNR to the wide decoder's image, dB", ylabel="share of latents below", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8)
    return figure


@styled
def crops_figure(folder: Path, evaluation: Evaluation, kind: str) -> Figure:
    """Crops of the first images: real, wide, narrow before and after training, and the last one's error, amplified."""
    names = [decoder["name"] for decoder in evaluation["decoders"]]
    columns = {"real image": folder / "images/real"} if kind == "real" else {}
    columns |= {name: folder / "images" / name / kind for name in names}
    shown = min(SHOWN, len(list((folder / "images" / names[0] / kind).glob("*.png"))))
    figure = Figure(figsize=(1.7 * (len(columns) + 1), 1.75 * shown + 0.2), layout="constrained")
    cells = figure.subplots(shown, len(columns) + 1, squeeze=False)
    for i, line in enumerate(cells):
        crops = [crop(path / f"{i:03d}.png") for path in columns.values()]
        error = np.abs(crops[-1].astype(float) - crops[list(columns).index("wide")].astype(float))
        titles = [*columns, f"its error × {AMPLIFIED}"]
        for axes, title, image in zip(
            line, titles, [*crops, np.clip(AMPLIFIED * error, 0, 255).astype("uint8")], strict=True
        ):
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if i == 0:
                axes.set_title(title, fontsize=9)
    return figure


def crop(path: Path) -> np.ndarray:
    """The middle of a picture, at its own resolution."""
    image = np.asarray(Image.open(path).convert("RGB"))
    top, left = (max(0, side - CROP) // 2 for side in image.shape[:2])
    return image[top : top + CROP, left : left + CROP]
