"""The report of an evaluation: a table, also as CSV and Markdown, curves over steps and guidance, the images."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from slimstep.engine.files import write_text
from slimstep.eval.pages.cautions import cautions
from slimstep.eval.pages.figures import MUTED, SERIES, canvas, grid_figure, save_figures, styled, themed
from slimstep.eval.pages.html import render
from slimstep.eval.pages.runs import read_json
from slimstep.eval.pages.tables import csv_table, markdown_table
from slimstep.eval.pages.text import count, flatten, overlap_sentence

Results = Mapping[str, Any]


def write_evaluation_report(folder: str | Path, track: Callable[[], None] = lambda: None) -> Path:
    """Makes table.md, results.csv, `folder`/report/*.png and `folder`/report.html anew from results.json.

    `track` is called when the pictures are there; the page, which says that all is done, comes last.
    """
    folder = Path(folder)
    results = read_json(folder / "results.json")
    figures = draw_figures(folder, results)
    write_text(folder / "table.md", markdown_table(header(results), rows(results)))
    write_text(folder / "results.csv", csv_table(summary(results)["points"]))
    save_figures(folder / "report", figures)
    track()
    page = render(
        "evaluation.html.j2",
        cautions=cautions(folder),
        name=folder.name,
        reference=results["reference"],
        seen=overlap_sentence(results),
        header=header(results),
        rows=rows(results),
        figures={name: Markup(themed(figure, name)) for name, figure in figures.items()},
        facts=flatten({key: results[key] for key in ("models", "prompts", "n", "protocol", "environment")}),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def header(results: Results) -> list[str]:
    return list(columns(results))


def rows(results: Results) -> list[list[str]]:
    """A line per model and setting; differences are paired prompt by prompt."""
    return [[cell(point) for cell in columns(results).values()] for point in results["points"]]


def columns(results: Results) -> dict[str, Callable[[Results], str]]:
    """{heading: what it shows of a point}; columns of what was measured nowhere are left out."""
    shown = {
        "model": lambda p: p["model"],
        "guidance": lambda p: f"{p['guidance']:g}",
        "steps": lambda p: str(p["steps"]),
        "UNet, decoder": lambda p: f"{count(p['parameters']['UNet'])}, {count(p['parameters']['decoder'])}",
        "UNet evaluations": lambda p: str(p["evaluations"]),
        "CLIP ± se": lambda p: f"{p['clip']['mean']:.2f} ± {p['clip']['se']:.2f}",
        "against the reference": lambda p: difference(p["versus_reference"]),
        "PSNR, dB": lambda p: near(p, "psnr", ".1f"),
        "features": lambda p: near(p, "features", ".3f"),
    }
    points = results["points"]
    for name in dict.fromkeys(name for p in points for name in p["preferences"]):
        shown |= preference_columns(name)
    measured = {key for p in points for key in p["distribution"] or ()}
    if "fd" in measured:
        shown["FD ×100"] = lambda p: distance(p, "fd", 100)
        shown["KD ×1000 ± sd"] = lambda p: distance(p, "kd", 1000)
    if "fid" in measured:
        shown["FID"] = lambda p: distance(p, "fid", 1)
        shown["KID ×1000 ± sd"] = lambda p: distance(p, "kid", 1000)
    return shown


def preference_columns(name: str) -> dict[str, Callable[[Results], str]]:
    def score(point: Results) -> str:
        own = point["preferences"].get(name)
        return f"{own['mean']:.2f} ± {own['se']:.2f}" if own else "–"

    def versus(point: Results) -> str:
        return difference(point["preferences"].get(name, {}).get("versus_reference"))

    return {f"{name} ± se": score, f"{name} against the reference": versus}


def difference(paired: Results | None) -> str:
    """A paired difference with its interval; a dash for the reference itself."""
    if paired is None:
        return "–"
    return f"{paired['mean']:+.2f} [{paired['low']:+.2f}, {paired['high']:+.2f}]".replace("-", "−")


def near(point: Results, measure: str, form: str) -> str:
    """Nearness to the reference's images; a dash for the reference itself and images of another size."""
    if point["versus_reference"] is None or point["to_reference"] is None:
        return "–"
    return format(point["to_reference"][measure]["mean"], form)


def distance(point: Results, name: str, times: int) -> str:
    """A distance to real images, with its standard deviation where it has one; a dash where it was not measured."""
    measured = point["distribution"] or {}
    if name not in measured:
        return "–"
    spread = f" ± {times * measured[f'{name}_se']:.2f}" if f"{name}_se" in measured else ""
    return f"{times * measured[name]:.2f}{spread}"


def summary(results: Results) -> dict[str, Any]:
    """What a program wants to know, without the scores of single prompts."""
    kept = ("model", "guidance", "steps", "parameters", "evaluations", "clip", "versus_reference", "preferences",
            "to_reference", "distribution")  # fmt: skip
    points = [without_prompts({key: point[key] for key in kept}) for point in results["points"]]
    return {"reference": results["reference"], "n": results["n"], "points": points}


def without_prompts(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: without_prompts(inner) for key, inner in value.items() if key != "per_prompt"}


def draw_figures(folder: Path, results: Results) -> dict[str, Figure]:
    """Curves where there is more than one number of steps or guidance scale; images, if kept, at the first setting."""
    points, figures = results["points"], {}
    for x, other, label in (("steps", "guidance", "sampling steps"), ("guidance", "steps", "guidance scale")):
        if len({p[x] for p in points}) > 1:
            figures[f"clip-against-{x}"] = curve_figure(points, x, other, label)
    if results["shown"]:
        figures["images"] = images_figure(folder, results)
    return figures


@styled
def curve_figure(points: list[Mapping[str, Any]], x: str, other: str, label: str) -> Figure:
    """CLIP score ± standard error against `x`; a colour per model, a kind of line per value of `other`."""
    figure, (axes,) = canvas(6.4, 4.6)
    models, values = list(dict.fromkeys(p["model"] for p in points)), sorted({p[other] for p in points})
    styles = dict(zip(values, itertools.cycle(("-", "--", ":", "-.")), strict=False))
    for model, colour in zip(models, itertools.cycle(SERIES), strict=False):
        axes.plot([], [], color=colour, marker="o", markersize=4, label=model)
        for value, style in styles.items():
            line = sorted((p for p in points if p["model"] == model and p[other] == value), key=lambda p: p[x])
            clip = [p["clip"] for p in line]
            axes.errorbar([p[x] for p in line], [c["mean"] for c in clip], [c["se"] for c in clip], capsize=2,
                          color=colour, linestyle=style, marker="o", markersize=4, linewidth=1.6)  # fmt: skip
    for value, style in styles.items():
        axes.plot(
            [], [], color=MUTED, linestyle=style, label=f"{value} steps" if other == "steps" else f"{other} {value:g}"
        )
    axes.set(xlabel=label, ylabel="CLIP score ± se")
    if x == "steps":
        axes.set_xscale("log")
        ticks = sorted({p["steps"] for p in points})
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def images_figure(folder: Path, results: Results) -> Figure:
    """Rows are models at the first of their settings, columns prompts, each always from the same noise."""
    places: dict[str, str] = {}
    for point in results["points"]:
        places.setdefault(point["model"], f"steps-{point['steps']}-guidance-{point['guidance']}")
    pictures = {name: sorted((folder / "images" / name / place).glob("*.png")) for name, place in places.items()}
    return grid_figure(list(pictures.items()), results["shown"])
