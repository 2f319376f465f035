"""The report's pictures, drawn with matplotlib: the evolution, CLIP against latency, predicted latency, images.

A picture is saved twice: as PNG for slides, and as SVG whose three neutral colours become the page's CSS variables, so
that it reads well on light and dark pages.
"""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from slimstep.engine.files import whole_folder
from slimstep.eval.pages.runs import finite
from slimstep.eval.pages.text import digits

INK, MUTED, LINE, PAPER = "#1b1f24", "#6b7280", "#d5d9e0", "#fffffe"  # the page's own; see `themed`
TEACHER, STUDENT, STEP = MUTED, "#d9480f", "#1c7ed6"
SERIES = ("#d9480f", "#1c7ed6", "#2b8a3e", "#ae3ec9", "#e67700", "#0b7285", "#c2255c", "#5c940d", "#795548")
DASHES = (0, (4, 3))
CHANGES = {"remove": (STUDENT, "removal"), "narrow": (STEP, "narrower part"), "quantize": (SERIES[2], "int8 or fp8"),
           "merge": (SERIES[3], "merged tokens")}  # fmt: skip
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.08,
}


@dataclass(frozen=True)
class Point:
    """One model in the plane of latency and CLIP score; `kind` is 'teacher', 'step' or 'student'."""

    label: str
    ms: float
    clip: float
    se: float
    kind: str = "student"
    colour: str = STUDENT


styled = matplotlib.rc_context(STYLE)  # decorates what draws; artists take their style when they are made


def themed(figure: Figure, name: str) -> str:
    """The figure as inline SVG in the page's own colours and font; `name` keeps its ids apart from other figures'."""
    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=False, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in ((INK, "ink"), (MUTED, "muted"), (LINE, "line"), (PAPER, "card")):
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "var(--sans)", svg)


def save_png(figure: Figure, path: Path) -> None:
    """The figure at 160 dots per inch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=160)


def save_figures(folder: Path, figures: Mapping[str, Figure]) -> None:
    """Each as NAME.png in `folder`, which is replaced as a whole."""
    with whole_folder(folder) as aside:
        for name, figure in figures.items():
            save_png(figure, aside / f"{name}.png")


def canvas(width: float, height: float, rows: int = 1) -> tuple[Figure, np.ndarray]:
    """A figure in inches with `rows` axes above each other that share x."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, 1, sharex=True))


# ---- charts ----


@styled
def evolution_figure(points: Sequence[Point], target_ms: float | None, predicted: Sequence[float | None]) -> Figure:
    """CLIP score (above) and latency (below) from the teacher through the rounds to the student.

    `predicted` holds, point by point, what the latency table foretold; None where it foretold nothing.
    """
    figure, (clip, ms) = canvas(6.4, 4.6, rows=2)
    x = range(len(points))
    colours = [point.colour for point in points]
    clip.axhline(points[0].clip, color=MUTED, linestyle=DASHES, linewidth=1, zorder=0)
    clip.plot(x, [p.clip for p in points], color=MUTED, linewidth=1.2, zorder=1)
    clip.errorbar(x, [p.clip for p in points], [p.se for p in points], fmt="none", ecolor=MUTED, capsize=3, zorder=2)
    clip.scatter(x, [p.clip for p in points], c=colours, s=46, zorder=3)
    clip.set_ylabel("CLIP score ± se")
    ms.bar(x, [p.ms for p in points], 0.55, color=colours, zorder=2)
    for k, point in enumerate(points):
        ms.text(k, 0.04 * points[0].ms, digits(point.ms), ha="center", va="bottom", fontsize=8, color="#ffffff")
    foretold = [(k, p) for k, p in enumerate(predicted) if finite(p)]
    if foretold:
        x_y = zip(*foretold, strict=True)
        ms.scatter(*x_y, marker="_", s=420, color=INK, linewidth=1.6, zorder=4, label="predicted")
    if target_ms is not None:
        ms.axhline(
            target_ms, color=MUTED, linestyle=DASHES, linewidth=1, label=f"target {digits(target_ms)} ms", zorder=3
        )
    if foretold or target_ms is not None:
        ms.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    ms.set_ylim(0, 1.22 * max([p.ms for p in points] + [target_ms or 0]))
    ms.set_ylabel("denoiser latency, ms")
    ms.set_xticks(list(x), [p.label for p in points])
    for axes in (clip, ms):
        axes.grid(axis="x", visible=False)
    return figure


@styled
def pareto_figure(points: Sequence[Point], latency: str = "denoiser latency, ms") -> Figure:
    """CLIP score against latency, `ms` of a point in whatever unit `latency` says, with the front of models that none
    beats in both; up and left is better."""
    figure, (axes,) = canvas(6.4, 4.6)
    front = pareto_front(points)
    axes.step([p.ms for p in front], [p.clip for p in front], where="post", color=LINE, linewidth=2.5, zorder=0)
    for point in points:
        face = PAPER if point.kind == "teacher" else point.colour
        axes.errorbar(point.ms, point.clip, point.se, ecolor=point.colour, capsize=3, linewidth=1, alpha=0.7, zorder=2)
        size, alpha = (30, 0.55) if point.kind == "step" else (64, 1)
        axes.scatter(point.ms, point.clip, s=size, facecolor=face, edgecolor=point.colour, alpha=alpha, zorder=3)
    axes.set_xlabel(latency)
    axes.set_ylabel("CLIP score ± se")
    axes.margins(0.14, 0.16)
    label_points(figure, axes, points)
    return figure


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points, fastest first, that no other point beats in both latency and CLIP score."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.ms, -p.clip)):
        if not front or point.clip > front[-1].clip:
            front.append(point)
    return front


def label_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Each label beside its point, at the first of eight places where it covers no other label or point."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    taken = [axes.transData.transform((p.ms, p.clip)) for p in points]
    boxes: list = []
    for point in points:
        for dx, dy in ((8, 6), (8, -12), (-8, 6), (-8, -12), (0, 12), (0, -18), (14, 18), (14, -24)):
            align = "left" if dx > 0 else "right" if dx < 0 else "center"
            style = {"ha": align, "color": point.colour, "weight": "normal" if point.kind == "step" else "bold"}
            where = {"xy": (point.ms, point.clip), "xytext": (dx, dy), "textcoords": "offset points"}
            text = axes.annotate(point.label, **where, **style, fontsize=8)
            box = text.get_window_extent(renderer)
            if not any(box.overlaps(b) for b in boxes) and not any(box.contains(*xy) for xy in taken):
                break
            text.remove()
        else:
            axes.add_artist(text)
        boxes.append(box)


@dataclass(frozen=True)
class ChangePoint:
    """What a change saves and loses, and whether the search took it; where that is lost after local recovery, what was
    lost at once, too. action: as decision.json calls it."""

    saved_ms: float
    lost: float
    se: float
    action: str
    taken: bool
    at_once: float | None = None


@styled
def changes_figure(rounds: Mapping[str, Sequence[ChangePoint]], metric: str) -> Figure:
    """What every change of each round loses against the milliseconds it saves; filled are those that were taken. Right
    and low is better; losses lie on a scale that is linear near zero. A line leads to each from its loss at once."""
    figure, panels = canvas(6.4, 1.2 + 2.9 * len(rounds), rows=len(rounds))
    for axes, (name, changes) in zip(panels, rounds.items(), strict=True):
        axes.axhline(0, color=MUTED, linewidth=1, linestyle=DASHES, zorder=0)
        for action, (colour, label) in CHANGES.items():
            kind = [change for change in changes if change.action == action]
            if not kind:
                continue
            x, y, se = ([getattr(change, key) for change in kind] for key in ("saved_ms", "lost", "se"))
            axes.errorbar(x, y, se, fmt="none", ecolor=colour, alpha=0.35, linewidth=0.8, zorder=1)
            if recovered := [change for change in kind if change.at_once is not None]:
                x_at_once, first, last = zip(*((c.saved_ms, c.at_once, c.lost) for c in recovered), strict=True)
                axes.vlines(x_at_once, first, last, colour, alpha=0.35, linewidth=0.8, linestyle=DASHES, zorder=1)
                axes.scatter(x_at_once, first, s=26, marker="_", color=colour, linewidth=1, zorder=1,
                             label=f"{label}, before local recovery")  # fmt: skip
            faces = [colour if change.taken else PAPER for change in kind]
            axes.scatter(x, y, s=26, facecolor=faces, edgecolor=colour, linewidth=1, zorder=2)
            axes.scatter([], [], s=26, facecolor=colour, edgecolor=colour, label=f"{label}, taken")
            axes.scatter([], [], s=26, facecolor=PAPER, edgecolor=colour, label=f"{label}, not taken")
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}".replace("-", "−"))
        axes.set_ylabel(f"{metric} lost ± se")
        axes.set_title(name)
    panels[0].legend(frameon=False, fontsize=8, ncols=2)
    panels[-1].set_xlabel("saves, ms")
    return figure


@styled
def budgets_figure(budgets: Sequence[Mapping], metric: str) -> Figure:
    """What each search would lose at other shares of the latency: the sum of what its changes were scored to lose."""
    figure, (axes,) = canvas(6.4, 4.2)
    axes.axhline(0, color=MUTED, linewidth=1, linestyle=DASHES, zorder=0)
    known_budgets = [budget for budget in budgets if budget["lost"]]
    for search, colour in zip(dict.fromkeys(budget["search"] for budget in known_budgets), SERIES, strict=False):
        known = [budget for budget in known_budgets if budget["search"] == search]
        x, y, se = zip(*((100 * b["share"], b["lost"]["mean"], b["lost"]["se"]) for b in known), strict=True)
        axes.errorbar(x, y, se, color=colour, marker="o", markersize=4, linewidth=1.2, capsize=2, label=search)
    axes.set_yscale("symlog", linthresh=1.0)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}".replace("-", "−"))
    axes.invert_xaxis()
    axes.set_xlabel("denoiser latency, predicted, % of the teacher's")
    axes.set_ylabel(f"{metric} lost ± se, sum of the changes")
    if known_budgets:
        axes.legend(frameon=False, fontsize=8)
    return figure


@styled
def additivity_figure(samples: Sequence[dict]) -> Figure:
    """What the latency table predicts for random architectures against what they took."""
    figure, (axes,) = canvas(6.4, 4.6)
    predicted, measured = ([sample[key] for sample in samples] for key in ("predicted_ms", "measured_ms"))
    low, high = min(predicted + measured), max(predicted + measured)
    axes.axline((low, low), (high, high), color=MUTED, linewidth=1, linestyle=DASHES)
    band = {"y1": [0.9 * low, 0.9 * high], "y2": [1.1 * low, 1.1 * high]}
    axes.fill_between([low, high], **band, color=MUTED, alpha=0.1, linewidth=0)
    axes.scatter(measured, predicted, s=30, color=STEP, alpha=0.8)
    axes.set_xlabel("measured, ms")
    axes.set_ylabel("predicted from the table, ms")
    axes.text(high, 1.1 * high, "±10 %", fontsize=8, color=MUTED, ha="right", va="bottom")
    return figure


def show_image(axes: Axes, image: np.ndarray | None) -> None:
    """An image without ticks and frame; nothing at all for None."""
    if image is not None:
        axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


@styled
def grid_figure(
    rows: Sequence[tuple[str, Sequence[Path | None]]], prompts: Sequence[str], columns: int | None = None
) -> Figure:
    """Rows of images, one row per model, each column one prompt and one noise; None leaves a cell empty. Without
    `columns` there are up to 8, or 2 of wide images, as rows of frames."""
    first = next(path for _, paths in rows for path in paths if path)
    width, height = Image.open(first).size
    is_wide = width > 2 * height
    columns = min(columns or (2 if is_wide else 8), len(prompts), *(len(paths) for _, paths in rows))
    size = (5.0, 5.0 * height / width) if is_wide else (1.5, 1.5)
    figure = Figure(figsize=(size[0] * columns + 0.4, size[1] * len(rows) + 0.75), layout="constrained")
    cells = figure.subplots(len(rows), columns, squeeze=False)
    for (name, paths), line in zip(rows, cells, strict=True):
        for path, axes in zip(paths, line, strict=False):
            show_image(axes, np.asarray(Image.open(path)) if path else None)
        line[0].set_ylabel(name, fontsize=9)
    for prompt, axes in zip(prompts, cells[-1], strict=False):
        axes.set_xlabel(textwrap.fill(prompt, 24), fontsize=6.5, color=MUTED, parse_math=False)
    return figure
