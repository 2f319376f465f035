"""The pictures of a page of several runs: CLIP against time, curves, benchmarks, pipelines, the grid of images."""

from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from slimstep.eval.pages.evaluation_page import draw_curves
from slimstep.eval.pages.gathered import Gathered
from slimstep.eval.pages.html import data_uri
from slimstep.eval.pages.pareto import Condition, plane, time_figure
from slimstep.eval.pages.results import Results, Setting, setting, setting_text
from slimstep.eval.pages.speed_page import draw_figures, parts_figure, rows_that_ran

NUM_PICTURES = 8  # prompts in the grid


@dataclass(frozen=True)
class Picture:
    """A figure, its file's name, and the heading above it on the page."""

    name: str
    heading: str
    figure: Figure


def draw_sections(gathered: Gathered) -> dict[str, list[Picture]]:
    """{section of the page: its pictures}, empty where nothing was measured for it."""
    return {
        "time": [draw_time(gathered, condition) for condition in gathered.conditions],
        "curves": [Picture(name, f"over {label}", figure) for name, label, figure in draw_curves(gathered.compared)],
        "cumulative": draw_speed(gathered, "cumulative"),
        "benchmark": [p for run, results in gathered.of_kind("benchmark").items() for p in draw_parts(run, results)],
        "pipelines": draw_speed(gathered, "pipelines"),
    }


def draw_time(gathered: Gathered, condition: Condition) -> Picture:
    timed, base = gathered.timings[condition], gathered.reference_of(gathered.reference)
    in_one_run = len({timing.run for timing in timed.values()}) == 1
    figure = time_figure(plane(gathered.compared, timed, base), condition, timed.get(base) if in_one_run else None)
    name = "clip-against-time" if condition == gathered.conditions[0] else "clip-against-time-fastest"
    return Picture(name, str(condition), figure)


def draw_speed(gathered: Gathered, kind: str) -> list[Picture]:
    """The figures of the runs' own reports."""
    return [
        Picture(f"{run}-{name}".replace("/", "-"), run if name == kind else f"{run}, {name.replace('-', ' ')}", figure)
        for run, results in gathered.of_kind(kind).items()
        for name, figure in draw_figures(results).items()
    ]


def draw_parts(run: str, results: Results) -> list[Picture]:
    """Where the time of all models goes, on one scale; nothing where no row ran. What all share is said once."""
    if not (ran := rows_that_ran(results)):
        return []
    setups = [row["name"].split(", ") for row in ran]
    shared = [word for word in setups[0] if all(word in setup for setup in setups)]
    names = [", ".join([row["model"], *(word for word in setup if word not in shared)])
             for row, setup in zip(ran, setups, strict=True)]  # fmt: skip
    figure = parts_figure([{**row, "name": name} for row, name in zip(ran, names, strict=True)])
    return [Picture(f"{run}-parts".replace("/", "-"), ": ".join([run, ", ".join(shared)]), figure)]


def untimed(gathered: Gathered) -> list[str]:
    """What no picture of CLIP against time shows, since no benchmark timed it: models with guidance scale and steps."""
    models: dict[Setting, list[str]] = {}
    for point in gathered.compared:
        if not gathered.time(point):
            models.setdefault(setting(point), []).append(point.label)
    steps: dict[tuple[float, str], list[str]] = {}
    for (guidance, number), labels in models.items():
        steps.setdefault((guidance, ", ".join(labels)), []).append(str(number))
    return [f"{labels} at {', '.join(of)} steps, guidance {guidance:g}" for (guidance, labels), of in steps.items()]


def image_grid(gathered: Gathered) -> dict[str, Any] | None:
    """The pictures kept at the setting that most models have some of, the reference's before others.

    Rows are models, columns prompts.
    """
    kept: dict[Setting, list[dict[str, Any]]] = {}
    for point in gathered.compared:
        folder = gathered.runs[point.run].path / "images" / point.model
        paths = sorted((folder / f"steps-{point.steps}-guidance-{point.guidance}").glob("*.png"))[:NUM_PICTURES]
        if paths:
            kept.setdefault(setting(point), []).append({"label": point.label, "run": point.run, "paths": paths})
    if not kept:
        return None
    chosen = max(kept, key=lambda at: (len(kept[at]), at == setting(gathered.reference)))
    rows, count = kept[chosen], min(len(row["paths"]) for row in kept[chosen])
    for row in rows:
        row["images"] = [data_uri(path) for path in row["paths"][:count]]
    return {"at": setting_text(chosen), "rows": rows, "prompts": gathered.evaluations[rows[0]["run"]].shown[:count]}
