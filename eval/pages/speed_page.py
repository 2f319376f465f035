"""The report of a speed job: a table, also as CSV and Markdown, and a picture of where the time goes."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slimstep.engine.files import write_text
from slimstep.eval.pages.figures import MUTED, SERIES, STUDENT, canvas, styled
from slimstep.eval.pages.html import write_page
from slimstep.eval.pages.runs import read_speed
from slimstep.eval.pages.tables import Table, csv_table
from slimstep.eval.pages.text import difference, digits, flatten, percent, ratio, size
from slimstep.eval.timing.stage_timer import PARTS

Row = Mapping[str, Any]
Columns = dict[str, Callable[[Row], str]]  # {heading: what it shows of a row}
Results = Mapping[str, Any]
LABELS = {"benchmark": 4, "cumulative": 1, "pipelines": 4}  # columns that name a row
NOTES = {
    "benchmark": "Each row is timed beside the same pipeline in the base config, and the first model in it, call by "
    "call; a row of the base config itself shows what such a ratio is worth. PSNR is to the images that float32 draws "
    "from the same noise.",
    "cumulative": "Each row is built upon the last one that was kept, and timed beside it and the first, call by call; "
    "what is shown to be slower is not kept. The first row is timed beside another pipeline of its own kind: what a "
    "ratio is worth. PSNR and CLIP are against its images from the same noise.",
    "pipelines": "it/s are denoising steps a second of whole calls, from prompt to 8-bit images: text encoder and VAE "
    "are in them. ControlNets have random weights.",
}


def write_speed_report(folder: str | Path, track: Callable[[], None] = lambda: None) -> Path:
    """Makes table.md, results.csv and the page with its pictures anew from results.json."""
    folder = Path(folder)
    results = read_speed(folder / "results.json")
    rows, cold_start = rows_table(results), cold_start_table(results)
    costs = f"\n{cold_start.markdown}" if cold_start.rows else ""
    write_text(folder / "table.md", rows.markdown + costs)
    write_text(folder / "results.csv", csv_table(summary(results)["rows"]))
    return write_page(
        folder,
        "speed.html.j2",
        draw_figures(results),
        track,
        clock=results["protocol"]["clock"],
        table=rows,
        cold_start=cold_start,
        facts=flatten({key: results[key] for key in ("models", "protocol", "environment")}),
    )


def console_text(results: Results) -> str:
    """The table for a terminal, and below it what compiling cost and why rows could not run."""
    ran = {**results, "rows": rows_that_ran(results)}
    failed = [f"{', '.join(row_name(row))}: {reason_text(row)}" for row in results["rows"] if row["cannot"]]
    tables = [table.console for table in (rows_table(ran), cold_start_table(results)) if table.rows]
    return "\n".join([*tables, *failed])


def timed_beside(results: Results) -> list[str]:
    """What rows of a benchmark were timed beside but their own base: the first model, where there are others."""
    if results["kind"] != "benchmark":
        return []
    named = dict.fromkeys(name for row in results["rows"] for name in row.get("speedup", ()))
    return [name for name in named if name != "base"]


def rows_that_ran(results: Results) -> list[Row]:
    return [row for row in results["rows"] if not row["cannot"]]


def cold_start_table(results: Results) -> Table:
    """A line for each compiled row: seconds to the first image of a new process, and the break-even calls.

    A process that failed says why in the place of its seconds.
    """
    header = ["model", "steps", "batch", "config", "eager, s", "cold, s", "with artefacts, s", "with a kept cache, s",
              "break-even calls (cold)", "(artefacts)", "(kept cache)"]  # fmt: skip
    lines = []
    for row in results["rows"]:
        if cost := (row.get("cold_start") or row.get("first_image")):
            ways = [cost[way] for way in ("cold", "artifacts", "kept_cache")]
            seconds = [first_seconds(way) for way in (cost["eager"], *ways)]
            break_even = [f"{way['calls']:.0f}" if way and way.get("calls") is not None else "–" for way in ways]
            lines.append([row["model"], str(row["steps"]), str(row["batch"]), row["name"], *seconds, *break_even])
    return Table(header, lines, LABELS["benchmark"])


def first_seconds(way: Mapping[str, Any] | None) -> str:
    if not way:
        return "–"
    return reason_text(way) if "cannot" in way else f"{way['first_s']:.1f}"


def summary(results: Results) -> dict[str, Any]:
    """What a program wants to know: every row, whole."""
    return {"kind": results["kind"], "rows": results["rows"]}


# ---- cells ----


def rows_table(results: Results, title: str = "") -> Table:
    """A line per row, in the kind's columns; what could not run says why after its name."""
    shown, kind = columns(results), results["kind"]

    def line(row: Row) -> list[str]:
        if not row["cannot"]:
            return [cell(row) for cell in shown.values()]
        names = row_name(row)
        return [*names, reason_text(row), *["–"] * (len(shown) - len(names) - 1)]

    return Table(list(shown), list(map(line, results["rows"])), LABELS[kind], title, NOTES[kind])


def columns(results: Results) -> Columns:
    """The kind's columns; a benchmark's has one more for each number of steps of the first model, and for each part
    that some pipeline has."""
    if results["kind"] == "cumulative":
        return {"row": value("name"), "× row before": before, "× first": faster_than("first"),
                "kept": lambda row: "yes" if row["kept"] else "no", **MEASURES}  # fmt: skip
    if results["kind"] == "pipelines":
        fewer = ("ms", "10–90 %", "calls", "memory", "graphs")
        return {**{name: value(name) for name in ("task", "model", "batch", "mode")},
                "it/s": lambda row: digits(row["its"]), "× eager": faster_than("eager"),
                **{name: MEASURES[name] for name in fewer}}  # fmt: skip
    others = {f"× {name}": faster_than(name) for name in timed_beside(results)}
    parts = [part for part in PARTS if any(part in row.get("parts_ms", {}) for row in results["rows"])]
    return {**{name: value(name) for name in ("model", "steps", "batch")}, "config": value("name"),
            "× base": faster_than("base"), **others, **MEASURES, **{display(part): part_ms(part) for part in parts},
            "parts of whole": sum_of_parts}  # fmt: skip


def value(key: str) -> Callable[[Row], str]:
    return lambda row: str(row[key])


def faster_than(other: str) -> Callable[[Row], str]:
    return lambda row: ratio(row["speedup"].get(other))


def display(part: str) -> str:
    """Rows call every denoiser UNet, as they did when there was no other."""
    return "denoiser" if part == "UNet" else part


def part_ms(part: str) -> Callable[[Row], str]:
    return lambda row: digits(row["parts_ms"][part]) if part in row["parts_ms"] else "–"


def before(row: Row) -> str:
    """The speed-up over the row before; of the first row, that of the pipeline over itself."""
    itself = row["speedup"].get("itself")
    return f"itself: {ratio(itself)}" if itself else ratio(row["speedup"].get("before"))


def sum_of_parts(row: Row) -> str:
    """The parts' sum as a share of the whole call; beyond 3 % it says so."""
    if (share := row["parts_of_whole"]) is None:
        return "–"
    return percent(share) + ("" if abs(share - 1) <= 0.03 else ", beyond 3 %")


def graphs(row: Row) -> str:
    """How many graphs were compiled, with breaks between them, and later ones."""
    made, later = row["graphs"], row["recompiled"]
    breaks = f", {made['breaks']} breaks" if made["breaks"] else ""
    return f"{made['graphs']}{breaks}" + (f", {later} more later" if later else "")


MEASURES: Columns = {
    "ms": lambda row: digits(row["ms"]["median"]),
    "10–90 %": lambda row: f"{digits(row['ms']['p10'])}–{digits(row['ms']['p90'])}",
    "calls": lambda row: str(row["ms"]["n"]),
    "images/s": lambda row: digits(row["images_per_s"]),
    "of peak": lambda row: percent(row["share_of_peak"]) if "share_of_peak" in row else "–",
    "memory": lambda row: size(row["memory"]) if row["memory"] else "–",
    "graphs": graphs,
    "PSNR, dB": lambda row: f"{row['psnr']['mean']:.1f}" if row.get("psnr") else "–",
    "CLIP, paired": lambda row: difference(row.get("clip_difference")),
}


def row_name(row: Row) -> list[str]:
    """The cells that name a row: the first columns of its kind."""
    if "changes" in row:
        return [row["name"]]
    return [str(row[key]) for key in ("task", "model", "steps", "batch", "mode", "name") if key in row]


def reason_text(row: Row) -> str:
    return f"cannot run: {textwrap.shorten(row['cannot'], 100, placeholder=' …')}"


# ---- pictures ----


def draw_figures(results: Results) -> dict[str, Figure]:
    if not (ran := rows_that_ran(results)):
        return {}
    if results["kind"] == "cumulative":
        return {"cumulative": cumulative_figure(results["rows"])}
    if results["kind"] == "pipelines":
        return {f"batch-{batch}": tasks_figure([row for row in ran if row["batch"] == batch])
                for batch in dict.fromkeys(row["batch"] for row in ran)}  # fmt: skip
    return {f"parts-{name}": parts_figure([row for row in ran if row["model"] == name])
            for name in dict.fromkeys(row["model"] for row in ran)}  # fmt: skip


@styled
def parts_figure(rows: Sequence[Row]) -> Figure:
    """Milliseconds of one image or video of every config, and where they go."""
    figure, (axes,) = canvas(7.4, 0.34 * len(rows) + 1.3)
    left = np.zeros(len(rows))
    for colour, part in zip(SERIES, PARTS, strict=False):
        widths = np.array([row["parts_ms"].get(part, 0) / row["batch"] for row in rows])
        if widths.any():
            axes.barh(range(len(rows)), widths, left=left, height=0.62, color=colour, label=display(part), zorder=2)
        left += widths
    differ = len({row["steps"] for row in rows if "steps" in row}) > 1
    names = [f"{row['name']}{', {} steps'.format(row['steps']) if differ else ''}, batch {row['batch']}"
             for row in rows]  # fmt: skip
    bars(axes, names, "milliseconds, over the batch")
    axes.legend(frameon=False, fontsize=8, ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1))
    return figure


@styled
def cumulative_figure(rows: Sequence[Row]) -> Figure:
    """The time of one image in units of the first row's, row upon row; a pale bar was not kept."""
    figure, (axes,) = canvas(7.4, 0.42 * len(rows) + 1.1)
    before = 100.0
    for y, row in enumerate(rows):
        if row["cannot"]:
            reason = textwrap.shorten(row["cannot"], 80, placeholder=" …")
            axes.text(1, y, reason, va="center", fontsize=7.5, color=MUTED)
            continue
        faster = row["speedup"].get("first", {"ratio": 1.0})["ratio"]
        share, colour = 100 / faster, STUDENT if row["kept"] else MUTED
        axes.barh(y, share, height=0.62, color=colour, alpha=1 if row["kept"] else 0.35, zorder=2)
        if row["kept"] and share < before:
            axes.barh(y, before - share, left=share, height=0.62, color=colour, alpha=0.16, zorder=1)
        axes.text(max(share, before if row["kept"] else 0) + 1, y, f"{faster:.2f}×", va="center", fontsize=8)
        before = share if row["kept"] else before
    bars(axes, [row["name"] for row in rows], "time of an image, % of the first row's")
    return figure


@styled
def tasks_figure(rows: Sequence[Row]) -> Figure:
    """Denoising steps a second: a group per task, a bar per model and mode."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    kinds = list(dict.fromkeys((row["model"], row["mode"]) for row in rows))
    figure, (axes,) = canvas(7.4, 3.6)
    width = 0.8 / len(kinds)
    for k, (model, mode) in enumerate(kinds):
        of_kind = [row for row in rows if (row["model"], row["mode"]) == (model, mode)]
        x = [tasks.index(row["task"]) + (k + 0.5) * width - 0.4 for row in of_kind]
        axes.bar(
            x, [row["its"] for row in of_kind], 0.92 * width, color=SERIES[k % len(SERIES)], label=f"{model}, {mode}"
        )
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("denoising steps a second")
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def bars(axes: Axes, names: Sequence[str], label: str) -> None:
    """Horizontal bars read from above, named at the left."""
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
