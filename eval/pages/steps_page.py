"""The report of a distillation: CLIP and distance against steps, CLIP against time, the images, all on one page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullFormatter

from slimstep.eval.metrics.compare import paired_ratio
from slimstep.eval.pages.evaluation_page import further_scores, spread_columns
from slimstep.eval.pages.figures import MUTED, SERIES, grid_figure, styled
from slimstep.eval.pages.html import Pair, pairs, write_page
from slimstep.eval.pages.runs import read_json
from slimstep.eval.pages.tables import Table, console_table
from slimstep.eval.pages.text import difference, flatten, overlap_sentence, ratio, score
from slimstep.eval.record import Point, read_evaluation

OTHER_SAMPLERS = {"teacher-dpm": "over DPM++'s", "teacher-stretched": "over stretched Euler's"}  # {model: its column}
MOST_ROWS = 8
NAMES = {"teacher-dpm": "teacher, DPM++ 2M", "teacher-stretched": "teacher, stretched", "teacher-v": "teacher, v",
         "student": "student, undistilled"}


def write_steps_report(folder: str | Path, track: Callable[[], None] = lambda: None) -> Path:
    """Makes the page and its pictures anew from the evaluation and the images."""
    folder = Path(folder)
    evaluation, points = read_evaluation(folder), timed_points(folder)
    figures = {
        "clip-against-steps": curves_figure(points, "steps", "sampling steps"),
        "clip-against-time": curves_figure(points, "unet_ms", "denoiser time of an image, ms"),
        "distance-against-steps": distance_figure(points),
        **{f"images-guidance-{g:g}": images_figure(folder, points, g) for g in guidances(points)},
        **{f"training-{stage}": figure for stage in models(points) if (figure := training_figure(folder / stage))},
    }
    return write_page(
        folder,
        "steps.html.j2",
        figures,
        track,
        seen=overlap_sentence(evaluation.n, evaluation.seen),
        table=points_table(points),
        pairs=teacher_and_student(folder, points, evaluation.shown),
        facts=flatten({"n": evaluation.n, **evaluation.protocol, **evaluation.environment}),
    )


@dataclass(frozen=True)
class TimedPoint(Point):
    """A point with the milliseconds of all denoiser evaluations of one image."""

    unet_ms: float = 0.0


def timed_points(folder: Path) -> list[TimedPoint]:
    """The points of the run's evaluation with the time of an image."""
    unet_ms = read_json(folder / "unet_ms.json")["ms"]
    return [TimedPoint(**vars(point), unet_ms=image_ms(point, unet_ms)) for point in read_evaluation(folder).points]


def image_ms(point: Point, unet_ms: Mapping[str, Mapping[str, float]]) -> float:
    """Milliseconds of all denoiser evaluations of one image."""
    rows = point.facts["evaluations"] // point.steps
    return point.steps * unet_ms[str(rows)]["teacher" if point.model in OTHER_SAMPLERS else point.model]


def curves_table(points: Sequence[Point]) -> str:
    """Per guidance scale and model: CLIP ± standard error at every number of steps."""
    steps = sorted({point.steps for point in points})
    cells = {key(point): score(point.clip, least=1) for point in points}
    rows = [
        [display(model), f"{guidance:g}", *(cells.get((guidance, model, n), "") for n in steps)]
        for guidance in guidances(points)
        for model in models(points)
    ]
    return console_table(["model", "guidance", *(f"{n} steps" for n in steps)], rows, labels=2)


def points_table(points: Sequence[TimedPoint]) -> Table:
    """A line per point; differences are to the teacher at its most steps and the same guidance scale.

    The latent error is also given in units of the teacher's own at as many steps, by DDIM (Euler's for a flow) and by
    the other samplers that it was evaluated with.
    """
    samplers = [name for name in OTHER_SAMPLERS if name in models(points)]
    ratios = ["over teacher's", *(OTHER_SAMPLERS[name] for name in samplers)]
    header = ["model", "guidance", "steps", "denoiser evaluations", "denoiser ms", "CLIP ± se", "against teacher",
              "latent error", *ratios, "PSNR, dB", "features"]  # fmt: skip
    by_key, rows, more = {key(p): p for p in points}, [], further_scores(points) | spread_columns(points)
    for p in points:
        over = [ratio(error_ratio(p, by_key.get((p.guidance, sampler, p.steps)))) for sampler in ("teacher", *samplers)]
        rows.append([
            display(p.model), f"{p.guidance:g}", str(p.steps), str(p.facts["evaluations"]), f"{p.unet_ms:.1f}",
            score(p.clip), difference(p.versus_reference),
            number(p, "latent_error", ".4f"), *over, number(p, "psnr", ".1f"), number(p, "features", ".3f"),
            *(show(p) for show in more.values()),
        ])  # fmt: skip
    return Table([*header, *more], rows)


def number(point: Point, metric: str, form: str) -> str:
    """The mean of a metric; a dash for the reference, which is compared with nothing."""
    mean = point.mean(metric)
    return "–" if mean is None else format(mean, form)


def error_ratio(point: Point, other: Point | None) -> dict[str, float] | None:
    """The latent error in units of another point's, prompt by prompt; None where either has none."""
    errors, others = (p and p.metrics.get("latent_error") for p in (point, other))
    is_apart = errors and others and others["mean"]
    return vars(paired_ratio(errors["per_prompt"], others["per_prompt"])) if is_apart else None


def display(model: str) -> str:
    return NAMES.get(model, model)


def key(point: Point) -> tuple[float, str, int]:
    return point.guidance, point.model, point.steps


def guidances(points: Sequence[Point]) -> list[float]:
    return sorted({point.guidance for point in points})


def models(points: Sequence[Point]) -> list[str]:
    """In the order in which they were evaluated."""
    return list(dict.fromkeys(point.model for point in points))


def colours(points: Sequence[Point]) -> dict[str, str]:
    students = [name for name in models(points) if not name.startswith("teacher")]
    series = {name: SERIES[k % len(SERIES)] for k, name in enumerate(students)}
    return {name: series.get(name, MUTED) for name in models(points)}


def panels(points: Sequence[Point], x_label: str, y_label: str) -> tuple[Figure, dict[float, Axes]]:
    """A figure with one chart per guidance scale; x is logarithmic."""
    scales = guidances(points)
    figure = Figure(figsize=(1 + 3.3 * len(scales), 3.9), layout="constrained")
    charts = dict(zip(scales, figure.subplots(1, len(scales), sharey=True, squeeze=False)[0], strict=True))
    for guidance, axes in charts.items():
        axes.set(xscale="log", xlabel=x_label, title=f"guidance {guidance:g}")
    charts[scales[0]].set_ylabel(y_label)
    return figure, charts


def lines(points: Sequence[Point], guidance: float) -> dict[str, list[Point]]:
    """Each model's points at one guidance scale, fewest steps first."""
    mine = [point for point in points if point.guidance == guidance]
    return {name: sorted((p for p in mine if p.model == name), key=key) for name in models(points)}


def style_of(model: str, colour: str) -> dict[str, Any]:
    return {"color": colour, "label": display(model), "linewidth": 1.6, "marker": "o", "markersize": 4,
            "linestyle": ":" if model in OTHER_SAMPLERS else "-"}  # fmt: skip


@styled
def curves_figure(points: Sequence[Point], x: str, x_label: str) -> Figure:
    """CLIP score ± standard error against `x`, a key of the points."""
    figure, charts = panels(points, x_label, "CLIP score ± se")
    for guidance, axes in charts.items():
        for model, line in lines(points, guidance).items():
            places, clip = [getattr(p, x) for p in line], [p.clip for p in line]
            style = style_of(model, colours(points)[model])
            axes.errorbar(places, [c["mean"] for c in clip], [c["se"] for c in clip], capsize=2, **style)
    finish(charts, points, x)
    return figure


@styled
def distance_figure(points: Sequence[Point]) -> Figure:
    """Squared error of the latents to the teacher's most steps, at equal noise; which has none itself."""
    figure, charts = panels(points, "sampling steps", "squared error of the latents")
    for guidance, axes in charts.items():
        axes.set_yscale("log")
        for model, line in lines(points, guidance).items():
            apart = [(p.steps, error) for p in line if (error := p.mean("latent_error"))]
            axes.plot(*zip(*apart, strict=True), **style_of(model, colours(points)[model]))
    finish(charts, points, "steps")
    return figure


def finish(charts: Mapping[float, Axes], points: Sequence[Point], x: str) -> None:
    """Plain numbers on the axis, and one legend."""
    for axes in charts.values():
        if x == "steps":
            axes.set_xticks(sorted({point.steps for point in points}))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    charts[max(charts)].legend(frameon=False, fontsize=8)


def training_figure(stage: Path) -> Figure | None:
    """What a stage's student drew while it was trained, from first to last (train.evaluate_every): at most MOST_ROWS
    times, each a row."""
    times = sorted((stage / "previews").glob("step-*"))
    shown = times if len(times) <= MOST_ROWS else [times[round(k * (len(times) - 1) / (MOST_ROWS - 1))]
                                                   for k in range(MOST_ROWS)]  # fmt: skip
    rows = [(f"{int(time.name.removeprefix('step-'))} steps", sorted(time.glob("*.png"))) for time in shown]
    return grid_figure(rows, [""] * len(rows[0][1])) if rows else None


def teacher_and_student(folder: Path, points: Sequence[Point], prompts: Sequence[str]) -> list[Pair]:
    """The teacher's pictures at its most steps, and the last student's at its fewest, at one guidance scale."""
    student = models(points)[-1]
    few = min((point for point in points if point.model == student), key=key)
    many = max((p for p in points if p.model == "teacher" and p.guidance == few.guidance), key=key, default=few)
    shown = {f"{display(p.model)}, {p.steps} steps":
             sorted((folder / f"images/{p.model}/steps-{p.steps}-guidance-{p.guidance}").glob("*.png"))
             for p in (many, few)}  # fmt: skip
    return pairs(shown, prompts)


def images_figure(folder: Path, points: Sequence[Point], guidance: float) -> Figure:
    """Rows are models, columns numbers of steps; the first prompt, always from the same noise."""
    steps = sorted({point.steps for point in points})
    evaluated = {key(point) for point in points}

    def path(model: str, n: int) -> Path | None:
        is_evaluated = (guidance, model, n) in evaluated
        return folder / f"images/{model}/steps-{n}-guidance-{guidance}/000.png" if is_evaluated else None

    rows = [(display(model), [path(model, n) for n in steps]) for model in models(points)]
    return grid_figure(rows, [f"{n} steps" for n in steps], columns=len(steps))
