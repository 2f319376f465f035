"""CLIP score against end-to-end time: an evaluation's points joined with the benchmark rows that timed them.

A row times a point where model, sampling steps and guidance scale are the same. Times go into one picture where device,
clock, setup and batch are the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from slimstep.eval.pages.figures import DASHES, MUTED, PAPER, SERIES, Point, canvas, label_points, pareto_front, styled
from slimstep.eval.pages.results import Results, Row, same_path, setting
from slimstep.eval.pages.speed_page import rows_that_ran

Key = tuple[str, float, int]  # label, guidance scale, sampling steps


@dataclass(frozen=True)
class Condition:
    """What times must share to be set beside each other."""

    device: str
    clock: str
    setup: str
    batch: int

    @property
    def unit(self) -> str:
        return "ms" if self.clock == "wall" else "ms of one thread's CPU time"

    def __str__(self) -> str:
        return f"{self.setup}, batch {self.batch}, on {self.device}"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one image, from the prompt's text to 8 bits, and the benchmark that measured them."""

    ms: float
    run: str


def key(point: Row) -> Key:
    return (point.label, *setting(point))


def join(points: Sequence[Row], benchmarks: Mapping[str, Results]) -> dict[Condition, dict[Key, Timing]]:
    """The time of every point that was timed, under every condition; the first of several benchmarks counts."""
    timings: dict[Condition, dict[Key, Timing]] = {}
    for run, results in benchmarks.items():
        protocol, device = results["protocol"], results["environment"]["device"]
        for row in rows_that_ran(results):
            condition = Condition(device, protocol["clock"], row["name"], row["batch"])
            timed_setting = protocol["guidance_scale"], row["steps"]
            where, timing = results["models"][row["model"]], Timing(row["ms"]["median"] / row["batch"], run)
            for point in points:
                if (point.sampled_guidance, point.steps) == timed_setting and same_path(point.where, where):
                    timings.setdefault(condition, {}).setdefault(key(point), timing)
    return timings


def shown_conditions(timings: Mapping[Condition, Mapping[Key, Timing]]) -> list[Condition]:
    """Of the conditions that most points were timed under the first, and the fastest if that is another."""
    most = max(map(len, timings.values()), default=0)
    first, *others = [condition for condition, timed in timings.items() if len(timed) == most] or [None]
    if first is None:
        return []

    def mean_share(condition: Condition) -> float:
        shared = set(timings[first]) & set(timings[condition])
        shares = [timings[condition][k].ms / timings[first][k].ms for k in shared]
        return sum(shares) / len(shares) if shares else 1.0

    fastest = min(others, key=mean_share, default=first)
    return [first, fastest] if mean_share(fastest) < 1 else [first]


def speedup(timing: Timing, reference: Timing | None) -> str:
    """How many times as fast as the reference; ≈ where the two were timed in different runs, which drift apart."""
    if reference is None:
        return "–"
    return f"{'' if timing.run == reference.run else '≈'}{reference.ms / timing.ms:.2f}×"


def plane(points: Sequence[Row], timed: Mapping[Key, Timing], reference: Key) -> dict[str, list[Point]]:
    """{model: its timed points, fastest first} in the plane of time and score; a label says what differs within."""
    models = list(dict.fromkeys(point.label for point in points))
    shown = sorted((point for point in points if key(point) in timed), key=lambda point: timed[key(point)].ms)
    differ = {name for name in ("guidance", "steps") if len({getattr(point, name) for point in shown}) > 1}
    lines: dict[str, list[Point]] = {model: [] for model in models if any(p.label == model for p in shown)}
    for point in shown:
        words = [f"{point.steps} steps"] if "steps" in differ else []
        words += [f"guidance {point.guidance:g}"] if "guidance" in differ else []
        colour = SERIES[models.index(point.label) % len(SERIES)]
        kind, clip = "teacher" if key(point) == reference else "student", point.clip
        label = ", ".join(words) or point.label
        made = Point(label, timed[key(point)].ms, clip["mean"], clip["se"], kind, colour)
        lines[point.label].append(made)
    return lines


@styled
def time_figure(lines: Mapping[str, Sequence[Point]], condition: Condition, reference: Timing | None) -> Figure:
    """CLIP score ± standard error against the time of an image; the front is of those that none beats in both.

    `reference` gives the upper axis, the share of its time; None where another run timed it.
    """
    figure, (axes,) = canvas(6.4, 4.6)
    points = [point for line in lines.values() for point in line]
    front = pareto_front(points)
    axes.step([p.ms for p in front], [p.clip for p in front], where="post", color=MUTED, alpha=0.4, linewidth=2.5)
    for model, line in lines.items():
        ms, clip, se = ([getattr(point, name) for point in line] for name in ("ms", "clip", "se"))
        colour = line[0].colour
        faces = [PAPER if point.kind == "teacher" else colour for point in line]
        axes.plot(ms, clip, color=colour, alpha=0.5, linewidth=1)
        axes.errorbar(ms, clip, se, fmt="none", ecolor=colour, capsize=2, linewidth=1, alpha=0.45)
        axes.scatter(ms, clip, s=46, facecolor=faces, edgecolor=colour, linewidth=1.6, zorder=3)
        axes.scatter([], [], s=46, color=colour, label=model)
    for point in points:
        if point.kind == "teacher":
            axes.axhline(point.clip, color=MUTED, linestyle=DASHES, linewidth=0.8, zorder=0)
    axes.set(xlabel=f"time of an image, {condition.unit}", ylabel="CLIP score ± se")
    axes.margins(0.12, 0.16)
    axes.set_xlim(left=0)
    if reference:
        scale = 100 / reference.ms
        upper = axes.secondary_xaxis("top", functions=(lambda ms: ms * scale, lambda share: share / scale))
        upper.set_xlabel("% of the reference's time")
        upper.spines[:].set_visible(False)
    if any(point.label != model for model, line in lines.items() for point in line):
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    label_points(figure, axes, points)
    return figure
