"""The report of an evaluation: a table, also as CSV and Markdown, curves over steps and guidance, the images."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from data.files import whole_folder, write_text
from eval.figures import SERIES, canvas, grid_figure, save_png, styled, themed
from eval.report import csv_table, flatten, markdown_table, render
from eval.runs import read_json

Results = Mapping[str, Any]
HEADER = ["model", "guidance", "steps", "UNet evaluations", "CLIP ± se", "against the reference", "PSNR, dB",
          "features", "FD ×100", "KD ×1000 ± sd"]  # fmt: skip


def write_evaluation_report(folder: str | Path, track: Callable[[], None] = lambda: None) -> Path:
    """Makes table.md, results.csv, `folder`/report/*.png and `folder`/report.html anew from results.json.

    `track` is called when the pictures are there; the page, which says that all is done, comes last.
    """
    folder = Path(folder)
    results = read_json(folder / "results.json")
    figures = draw_figures(folder, results)
    write_text(folder / "table.md", points_table(results))
    write_text(folder / "results.csv", csv_table(summary(results)["points"]))
    with whole_folder(folder / "report") as aside:
        for name, figure in figures.items():
            save_png(figure, aside / f"{name}.png")
    track()
    page = render(
        "evaluation.html.j2",
        name=folder.name,
        reference=results["reference"],
        header=HEADER,
        rows=rows(results),
        figures={name: Markup(themed(figure, name)) for name, figure in figures.items()},
        facts=flatten({key: results[key] for key in ("models", "prompts", "n", "protocol", "environment")}),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def points_table(results: Results) -> str:
    return markdown_table(HEADER, rows(results))


def rows(results: Results) -> list[list[str]]:
    """A line per model and setting; differences are paired prompt by prompt."""
    lines = []
    for p in results["points"]:
        d, near, apart, clip = p["versus_reference"], p["to_reference"], p["distribution"], p["clip"]
        lines.append([
            p["model"], f"{p['guidance']:g}", str(p["steps"]), str(p["evaluations"]),
            f"{clip['mean']:.2f} ± {clip['se']:.2f}",
            "–" if d is None else f"{d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]".replace("-", "−"),
            "–" if d is None or near is None else f"{near['psnr']['mean']:.1f}",
            "–" if d is None or near is None else f"{near['features']['mean']:.3f}",
            "–" if apart is None else f"{100 * apart['fd']:.2f}",
            "–" if apart is None else f"{1000 * apart['kd']:.2f} ± {1000 * apart['kd_se']:.2f}",
        ])  # fmt: skip
    return lines


def summary(results: Results) -> dict[str, Any]:
    """What a program wants to know, without the scores of single prompts."""
    points = [{**p, "clip": {key: p["clip"][key] for key in ("mean", "se")}} for p in results["points"]]
    kept = ("model", "guidance", "steps", "evaluations", "clip", "versus_reference", "to_reference", "distribution")
    return {"reference": results["reference"], "n": results["n"], "points": [{k: p[k] for k in kept} for p in points]}


def draw_figures(folder: Path, results: Results) -> dict[str, Figure]:
    """Curves where there is more than one number of steps or guidance scale, and the images at the first setting."""
    points, figures = results["points"], {}
    for x, other, label in (("steps", "guidance", "sampling steps"), ("guidance", "steps", "guidance scale")):
        if len({p[x] for p in points}) > 1:
            figures[f"clip-against-{x}"] = curve_figure(points, x, other, label)
    figures["images"] = images_figure(folder, results)
    return figures


@styled
def curve_figure(points: list[Mapping[str, Any]], x: str, other: str, label: str) -> Figure:
    """CLIP score ± standard error against `x`; a line per model and value of `other`."""
    figure, (axes,) = canvas(6.4, 4.2)
    models = list(dict.fromkeys(p["model"] for p in points))
    styles = ("-", "--", ":", "-.")
    for k, value in enumerate(sorted({p[other] for p in points})):
        for model in models:
            line = sorted((p for p in points if p["model"] == model and p[other] == value), key=lambda p: p[x])
            clip, colour = [p["clip"] for p in line], SERIES[models.index(model) % len(SERIES)]
            axes.errorbar([p[x] for p in line], [c["mean"] for c in clip], [c["se"] for c in clip], capsize=2,
                          color=colour, linestyle=styles[k % 4], marker="o", markersize=4, linewidth=1.6,
                          label=f"{model}, {other} {value:g}")  # fmt: skip
    axes.set(xlabel=label, ylabel="CLIP score ± se")
    if x == "steps":
        axes.set_xscale("log")
        ticks = sorted({p["steps"] for p in points})
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    return figure


def images_figure(folder: Path, results: Results) -> Figure:
    """Rows are models at the first setting, columns prompts, each always from the same noise."""
    first = results["points"][0]
    place = f"steps-{first['steps']}-guidance-{first['guidance']}"
    pictures = {name: sorted((folder / "images" / name / place).glob("*.png")) for name in results["models"]}
    return grid_figure(list(pictures.items()), results["shown"])
