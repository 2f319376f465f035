"""The table of size and steps: the whole network and a pruned one, each at the teacher's steps and at few.

Finished distillations of one teacher, on equal prompts from equal noise, are the rows; every difference is paired
prompt by prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from slimstep.engine.files import write_json, write_text
from slimstep.eval.metrics.compare import paired_difference
from slimstep.eval.pages.cautions import cautions_of
from slimstep.eval.pages.comparison import facts_that_differ, protocol_differences
from slimstep.eval.pages.evaluation_page import spread_columns
from slimstep.eval.pages.figures import grid_figure, save_figures, themed
from slimstep.eval.pages.html import render
from slimstep.eval.pages.results import metric
from slimstep.eval.pages.steps_page import TimedPoint, number, timed_points
from slimstep.eval.pages.tables import Table
from slimstep.eval.pages.text import difference, flatten, score
from slimstep.eval.record import Evaluation, Point, read_evaluation

SAME = 0.02  # CLIP of the teacher's images: more than batches and machines change it by, less than another teacher


@dataclass(frozen=True)
class Run:
    """A finished distillation of the network `label`, which is the teacher's own or a pruned one."""

    label: str
    path: Path
    evaluation: Evaluation
    points: Sequence[TimedPoint]

    def reference(self, guidance: float) -> TimedPoint:
        return next(p for p in self.points if self.evaluation.is_reference(p) and p.guidance == guidance)


@dataclass(frozen=True)
class Row:
    """A network at its number of steps; `share` is its time in units of its own run's teacher's, with which it was
    timed in turns."""

    label: str
    run: Run
    point: TimedPoint
    share: float


def read_runs(folders: Sequence[tuple[str, str | Path]]) -> list[Run]:
    """Of (label, folder), all comparable. ValueError for runs that are not finished, or not of one teacher, prompts,
    scorer and seed."""
    runs = [read_run(label, Path(folder)) for label, folder in folders]
    metrics = {str(run.path): metric(run.evaluation) for run in runs}
    if lines := protocol_differences(metrics):
        raise ValueError(f"these runs cannot stand in one table with {runs[0].path}: {'; '.join(lines)}")
    for run in runs[1:]:
        check_teacher(run, runs[0])
    return runs


def read_run(label: str, folder: Path) -> Run:
    evaluation = read_evaluation(folder) if folder.is_dir() else None
    if evaluation is None or not (folder / "unet_ms.json").is_file():
        raise ValueError(f"{folder} is no finished distillation: it has no evaluation.json with unet_ms.json beside it")
    if not evaluation.has_prompts:
        raise ValueError(f"{folder} distilled a model without prompts, and the table pairs them")
    return Run(label, folder, evaluation, timed_points(folder))


def check_teacher(run: Run, first: Run) -> None:
    """ValueError where the runs' teachers draw other images for the same prompts."""
    both = [r.evaluation.reference for r in (run, first)]
    if both[0] != both[1]:
        raise ValueError(f"{run.path} compares with {dict(both[0])}, and {first.path} with {dict(both[1])}")
    for point in run.points:
        if not run.evaluation.is_reference(point):
            continue
        other = first.evaluation.find(*point.key)
        if other and (point.protocol != other.protocol or farthest(point, other) > SAME):
            what = f"CLIP scores differ by up to {farthest(point, other):.3g} at guidance scale {point.guidance:g}"
            raise ValueError(f"{run.path} and {first.path} are not of one teacher: {what}")


def farthest(point: Point, other: Point) -> float:
    """The largest difference of two points' CLIP scores of a prompt."""
    return float(np.abs(np.subtract(point.clip["per_prompt"], other.clip["per_prompt"])).max())


def common_guidance(runs: Sequence[Run], requested: float | None = None) -> float:
    """The one scale at which every run has students. ValueError where there are several, and none is requested."""
    scales = set.intersection(*({p.guidance for p in students(run)} for run in runs))
    if requested is None and len(scales) == 1:
        return scales.pop()
    if requested not in scales:
        what = "several guidance scales" if requested is None and scales else f"guidance scale {requested}"
        raise ValueError(f"{what} for one table; all runs have students at {sorted(scales) or 'no common one'}")
    return float(requested)


def students(run: Run) -> list[TimedPoint]:
    """Every student at the number of steps that it was made for."""
    return [point for point in run.points if point.model == f"steps-{point.steps}"]


def rows_of(runs: Sequence[Run], guidance: float) -> list[Row]:
    """By label: the network before its distillation at the teacher's steps, then its students, most steps first. The
    first label's network is the teacher's; another one's has no row of many steps where no run has evaluated it there,
    as those do not that went on from a student of few steps.

    ValueError where two runs of one label have a student of the same number of steps, or began with other networks.
    """
    rows: list[Row] = []
    for label in dict.fromkeys(run.label for run in runs):
        mine = [run for run in runs if run.label == label]
        is_teachers = label == runs[0].label
        starts = [(run, start) for run in mine if (start := start_of(run, guidance, is_teachers))]
        if any(farthest(start, starts[0][1]) > SAME for _, start in starts[1:]):
            raise ValueError(f"{', '.join(str(run.path) for run in mine)} began with different networks: {label}")
        found = [(run, point) for run in mine for point in students(run) if point.guidance == guidance]
        if twice := sorted({p.steps for _, p in found if sum(q.steps == p.steps for _, q in found) > 1}):
            raise ValueError(f"{label}: more than one run has a student of {twice} steps; name one run for each")
        found.sort(key=lambda own: -own[1].steps)
        rows += [row(label, run, point, guidance) for run, point in [*starts[:1], *found]]
    return rows


def start_of(run: Run, guidance: float, is_teachers: bool) -> TimedPoint | None:
    """The network before its distillation, at the teacher's steps."""
    reference = run.reference(guidance)
    if is_teachers:
        return reference
    return next((p for p in run.points if p.model == "student" and p.key[1:] == reference.key[1:]), None)


def row(label: str, run: Run, point: TimedPoint, guidance: float) -> Row:
    return Row(label, run, point, point.unet_ms / run.reference(guidance).unet_ms)


# ---- tables ----


def points_table(rows: Sequence[Row]) -> Table:
    """A line per network and number of steps; differences are to the teacher, prompt by prompt."""
    spread = spread_columns([row.point for row in rows])
    return Table.of({
        "network": lambda r: r.label,
        "steps": lambda r: str(r.point.steps),
        "denoiser evaluations": lambda r: str(r.point.facts["evaluations"]),
        "CLIP ± se": lambda r: score(r.point.clip),
        "against the teacher, paired [95 %]": lambda r: difference(r.point.versus_reference),
        "features": lambda r: number(r.point, "features", ".3f"),
        "latent error": lambda r: number(r.point, "latent_error", ".4f"),
        **{heading: partial(of_point, show) for heading, show in spread.items()},
        "denoiser ms": lambda r: f"{r.point.unet_ms:.1f}",
        "of the teacher's": lambda r: f"{100 * r.share:.1f} %",
    }, rows, labels=2)  # fmt: skip


def of_point(show: Callable[[Point], str], row: Row) -> str:
    return show(row.point)


def pruning_effects(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """What another network costs beside the first one at equal steps, and how much more (or less) than it costs at the
    teacher's steps: with nothing beyond, the losses of size and of steps add up. Both are paired over prompts."""
    place = {(row.label, row.point.steps): clip(row) for row in rows}
    first, *others = dict.fromkeys(row.label for row in rows)
    most = rows[0].point.steps
    for label in others:
        for steps in sorted({s for name, s in place if name == label and (first, s) in place}, reverse=True):
            effect = place[label, steps] - place[first, steps]
            is_known = steps != most and (label, most) in place
            undistilled = place[label, most] - place[first, most] if is_known else None
            yield {
                "network": label,
                "steps": steps,
                "clip": asdict(paired_difference(place[label, steps], place[first, steps])),
                "beyond": None if undistilled is None else asdict(paired_difference(effect, undistilled)),
            }


def clip(row: Row) -> np.ndarray:
    return np.asarray(row.point.clip["per_prompt"])


def effects_table(rows: Sequence[Row], effects: Sequence[Mapping[str, Any]]) -> Table:
    first, most = rows[0].label, rows[0].point.steps
    return Table.of({
        "network": lambda effect: effect["network"],
        "steps": lambda effect: str(effect["steps"]),
        f"CLIP against {first} at as many steps [95 %]": lambda effect: difference(effect["clip"]),
        f"beyond that at {most} steps [95 %]": lambda effect: difference(effect["beyond"]),
    }, effects, labels=2)  # fmt: skip


# ---- files ----


def write_few_step(folders: Sequence[tuple[str, str | Path]], out: str | Path, guidance: float | None = None) -> str:
    """Writes `out`/table.md, table.json and report.html of (label, run); returns the tables for a terminal.

    The first label's runs are of the teacher's own network. Raises ValueError for runs that cannot be compared.
    """
    out, runs = Path(out), read_runs(folders)
    guidance = common_guidance(runs, guidance)
    rows = rows_of(runs, guidance)
    effects, first = list(pruning_effects(rows)), runs[0].evaluation
    tables = [points_table(rows), *([effects_table(rows, effects)] if effects else [])]
    pictures = images_figure(rows, first)
    save_figures(out / "report", {"images": pictures})
    page = render(
        "few_step.html.j2",
        cautions=cautions_of({run.path.name: run.path for run in runs}),
        title=f"{', '.join(dict.fromkeys(run.label for run in runs))} at {rows[0].point.steps} steps and at few",
        points=tables[0],
        effects=tables[1] if effects else None,
        images=Markup(themed(pictures, "images")),
        facts=facts_that_differ({run.path.name: facts(run, guidance) for run in runs}),
    )
    write_json(out / "table.json", {
        "guidance": guidance,
        "reference": first.reference,
        **{key: getattr(first, key) for key in ("prompts", "prompts_hash", "n", "protocol")},
        "environments": {run.path.name: run.evaluation.environment for run in runs},
        "rows": [row_json(row) for row in rows],
        "effects": effects,
    })  # fmt: skip
    write_text(out / "table.md", "\n".join(table.markdown for table in tables))
    write_text(out / "report.html", page)
    return "\n".join(table.console for table in tables)


def row_json(row: Row) -> dict[str, Any]:
    point = rounded_point(row.point)
    return {"network": row.label, "run": row.run.path.name, "of_teachers_ms": row.share, **point}


def rounded_point(point: Point) -> dict[str, Any]:
    """A point with its values per prompt to what matters, for a file that is kept."""

    def rounded(own: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        has_prompts = own and own.get("per_prompt")
        return {**own, "per_prompt": [round(value, 6) for value in own["per_prompt"]]} if own and has_prompts else own

    return {**asdict(point), "metrics": {name: rounded(own) for name, own in point.metrics.items()}}


def facts(run: Run, guidance: float) -> dict[str, dict[str, Any]]:
    evaluation = run.evaluation
    known = flatten({"guidance": guidance, "n": evaluation.n, "prompts": evaluation.prompts, **evaluation.protocol})
    return {"Evaluation": known, "Environment": flatten(evaluation.environment)}


def images_figure(rows: Sequence[Row], evaluation: Evaluation) -> Figure:
    """Rows are networks at their steps, columns prompts, each always from the same noise."""

    def pictures(row: Row) -> list[Path]:
        point = row.point
        folder = row.run.path / f"images/{point.model}/steps-{point.steps}-guidance-{point.guidance}"
        return sorted(folder.glob("*.png"))

    return grid_figure([(f"{row.label}, {row.point.steps}", pictures(row)) for row in rows], evaluation.shown)
