"""The report of an evaluation: a table, also as CSV and Markdown, curves over steps and guidance, the images."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from slimstep.engine.files import write_text
from slimstep.eval.pages.figures import MUTED, SERIES, canvas, grid_figure, styled
from slimstep.eval.pages.html import Pair, pairs, write_page
from slimstep.eval.pages.tables import Table, csv_table
from slimstep.eval.pages.text import count, difference, flatten, overlap_sentence, ratio, score
from slimstep.eval.record import Evaluation, Point, read_evaluation

MOST_PAIRS = 4  # of a model, on the page


def write_evaluation_report(folder: str | Path, track: Callable[[], None] = lambda: None) -> Path:
    """Makes table.md, results.csv and the page with its pictures anew from evaluation.json."""
    folder = Path(folder)
    read = read_evaluation(folder)
    table = models_table(read.points)
    write_text(folder / "table.md", table.markdown)
    write_text(folder / "results.csv", csv_table(summary(read)["points"]))
    return write_page(
        folder,
        "evaluation.html.j2",
        draw_figures(folder, read),
        track,
        reference=read.reference,
        seen=overlap_sentence(read.n, read.seen),
        table=table,
        pairs=beside_the_reference(folder, read),
        facts=flatten({key: getattr(read, key) for key in ("models", "prompts", "n", "protocol", "environment")}),
    )


def models_table(points: Sequence[Point]) -> Table:
    """A line per model and setting; differences are paired prompt by prompt."""
    return Table.of(columns(points), points, labels=3)


def columns(points: Sequence[Point]) -> dict[str, Callable[[Point], str]]:
    """{heading: what it shows of a point}; columns of what was measured nowhere are left out."""
    shown = {
        "model": lambda p: p.model,
        "guidance": guidance_text,
        "steps": lambda p: str(p.steps),
        "denoiser, decoder": sizes,
        "denoiser evaluations": lambda p: str(p.facts.get("evaluations", "–")),
    }
    has_clip = any("clip" in p.metrics for p in points)
    if has_clip:
        shown |= score_columns("clip")
        shown |= {"PSNR, dB": lambda p: near(p, "psnr", ".1f"), "features": lambda p: near(p, "features", ".3f")}
    shown |= further_scores(points)
    if not has_clip:
        paired = dict.fromkeys(name for p in points for name in p.of_kind("paired"))
        shown |= {f"{name} to the reference": partial(near, metric=name, form=".3g") for name in paired}
    return shown | spread_columns(points)


def further_scores(points: Sequence[Point]) -> dict[str, Callable[[Point], str]]:
    """Of every per-image metric but CLIP score its mean and paired difference, and the ratio of those that have one."""
    names = dict.fromkeys(name for p in points for name in p.of_kind("per_image") if name != "clip")
    shown: dict[str, Callable[[Point], str]] = {}
    for name in names:
        shown |= score_columns(name)
        if name in by_ratio(points):
            shown[f"{name} over the reference's"] = partial(over_the_reference, metric=name)
    return shown


def by_ratio(points: Sequence[Point]) -> list[str]:
    """The metrics by whose ratio models are compared, as motion."""
    named = (name for p in points for name, own in p.metrics.items() if own and own.get("compared_by_ratio"))
    return list(dict.fromkeys(named))


def spread_columns(points: Sequence[Point]) -> dict[str, Callable[[Point], str]]:
    """What is said of all images together, as far as it was measured: diversity, and the distance to real images."""
    shown: dict[str, Callable[[Point], str]] = {}
    if any(p.of_kind("per_prompt") for p in points):
        shown["diversity ± se"] = lambda p: score(p.metrics.get("diversity"), least=3)
        shown["diversity over the reference's"] = partial(over_the_reference, metric="diversity")
    measured = {key for p in points for values in p.of_kind("distribution").values() for key in values}
    if "fd" in measured:
        shown["FD ×100"] = lambda p: distance(p, "fd", 100)
        shown["KD ×1000 ± sd"] = lambda p: distance(p, "kd", 1000)
    if "coverage" in measured:
        shown["coverage"] = coverage
        shown["density"] = lambda p: distance(p, "density", 1)
    if "fid" in measured:
        shown["FID"] = lambda p: distance(p, "fid", 1)
        shown["KID ×1000 ± sd"] = lambda p: distance(p, "kid", 1000)
    if "fvd" in measured:
        shown["FVD"] = lambda p: distance(p, "fvd", 1)
    return shown


def guidance_text(point: Point) -> str:
    """The scale that images were drawn with, and the reference's, where that is another."""
    beside = "" if point.sampled_guidance == point.guidance else f" (reference {point.guidance:g})"
    return f"{point.sampled_guidance:g}{beside}"


def sizes(point: Point) -> str:
    counts = point.facts.get("parameters", {})
    return f"{count(counts.get('UNet'))}, {count(counts.get('decoder'))}"


def score_columns(name: str) -> dict[str, Callable[[Point], str]]:
    """A per-image metric and its paired difference; CLIP score's headings name no metric."""
    heading, versus = ("CLIP", "") if name == "clip" else (name, f"{name} ")
    return {
        f"{heading} ± se": lambda p: score(p.metrics.get(name)),
        f"{versus}against the reference": lambda p: difference((p.metrics.get(name) or {}).get("versus_reference")),
    }


def over_the_reference(point: Point, metric: str) -> str:
    """A metric's mean over the reference's, with its interval; a dash for the reference itself."""
    return ratio((point.metrics.get(metric) or {}).get("ratio_to_reference"))


def near(point: Point, metric: str, form: str) -> str:
    """Nearness to the reference's images; a dash for the reference itself and images of another size."""
    mean = point.mean(metric)
    is_shown = mean is not None and ("clip" not in point.metrics or point.versus_reference is not None)
    return format(mean, form) if is_shown else "–"


def distance(point: Point, name: str, times: int) -> str:
    """A distance to real images, with its standard deviation where it has one; a dash where it was not measured."""
    measured = next((values for values in point.of_kind("distribution").values() if name in values), None)
    if measured is None:
        return "–"
    spread = f" ± {times * measured[f'{name}_se']:.2f}" if f"{name}_se" in measured else ""
    return f"{times * measured[name]:.2f}{spread}"


def coverage(point: Point) -> str:
    """Of real images, and what as many new real images would cover; a dash where it was not measured."""
    measured = next((own for own in point.of_kind("distribution").values() if "coverage" in own), None)
    return f"{measured['coverage']:.2f} of {measured['coverage_expected']:.2f}" if measured else "–"


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """What a program wants to know, without the scores of single prompts."""

    def without_prompts(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        left_out = ("per_prompt", "against_shuffled", "kind")
        return {key: without_prompts(inner) for key, inner in value.items() if key not in left_out}

    points = [{"model": p.model, "guidance": p.guidance, "sampled_guidance": p.sampled_guidance, "steps": p.steps,
               **p.facts, **p.metrics} for p in evaluation.points]  # fmt: skip
    return {"reference": evaluation.reference, "n": evaluation.n, "points": list(map(without_prompts, points))}


def draw_figures(folder: Path, evaluation: Evaluation) -> dict[str, Figure]:
    """Curves where there is more than one number of steps or guidance scale; images, if kept, at the first setting."""
    curves = draw_curves(evaluation.points) if evaluation.has_prompts else ()
    figures = {name: figure for name, _, figure in curves}
    if evaluation.shown:
        figures["images"] = images_figure(folder, evaluation)
    return figures


def draw_curves(points: Sequence[Point]) -> Iterator[tuple[str, str, Figure]]:
    """(name, what is on x, figure) where there is more than one number of steps, or guidance scale."""
    for x, other, label in (("steps", "guidance", "sampling steps"), ("guidance", "steps", "guidance scale")):
        if len({getattr(point, x) for point in points}) > 1:
            yield f"clip-against-{x}", label, curve_figure(points, x, other, label)


def name_of(point: Point) -> str:
    """What a point's model is called among those of several runs, or of its own."""
    return getattr(point, "label", point.model)


@styled
def curve_figure(points: Sequence[Point], x: str, other: str, label: str) -> Figure:
    """CLIP score ± standard error against `x`; a colour per model, a kind of line per value of `other`."""
    figure, (axes,) = canvas(6.4, 4.6)
    models, values = list(dict.fromkeys(map(name_of, points))), sorted({getattr(p, other) for p in points})
    styles = dict(zip(values, itertools.cycle(("-", "--", ":", "-.")), strict=False))
    for model, colour in zip(models, itertools.cycle(SERIES), strict=False):
        axes.plot([], [], color=colour, marker="o", markersize=4, label=model)
        for value, style in styles.items():
            line = [p for p in points if name_of(p) == model and getattr(p, other) == value]
            line.sort(key=attrgetter(x))
            clip = [p.clip for p in line]
            axes.errorbar([getattr(p, x) for p in line], [c["mean"] for c in clip], [c["se"] for c in clip], capsize=2,
                          color=colour, linestyle=style, marker="o", markersize=4, linewidth=1.6)  # fmt: skip
    for value, style in styles.items():
        name = f"{value} steps" if other == "steps" else f"{other} {value:g}"
        axes.plot([], [], color=MUTED, linestyle=style, label=name)
    axes.set(xlabel=label, ylabel="CLIP score ± se")
    if x == "steps":
        axes.set_xscale("log")
        ticks = sorted({p.steps for p in points})
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def images_figure(folder: Path, evaluation: Evaluation) -> Figure:
    """Rows are models at the first of their settings, columns prompts, each always from the same noise."""
    return grid_figure(list(first_pictures(folder, evaluation).items()), evaluation.shown)


def beside_the_reference(folder: Path, evaluation: Evaluation) -> dict[str, list[Pair]]:
    """{model: its first pictures and the reference's}, of all models but the reference."""
    pictures, reference = first_pictures(folder, evaluation), evaluation.reference["model"]
    shown = {name: pairs({reference: pictures[reference], name: own}, evaluation.shown, MOST_PAIRS)
             for name, own in pictures.items() if name != reference and reference in pictures}  # fmt: skip
    return {name: own for name, own in shown.items() if own}


def first_pictures(folder: Path, evaluation: Evaluation) -> dict[str, list[Path]]:
    """The pictures that every model drew at the first of its settings."""
    places: dict[str, str] = {}
    for point in evaluation.points:
        places.setdefault(point.model, f"steps-{point.steps}-guidance-{point.guidance}")
    return {name: sorted((folder / "images" / name / place).glob("*.png")) for name, place in places.items()}
