"""Several finished runs side by side: one table, one picture of CLIP against latency, differences paired by prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from slimstep.engine.files import write_text
from slimstep.eval.metrics.compare import paired_difference
from slimstep.eval.pages.cautions import cautions_of
from slimstep.eval.pages.evaluation_page import by_ratio, over_the_reference
from slimstep.eval.pages.figures import SERIES, TEACHER, Point, pareto_figure, save_png, themed
from slimstep.eval.pages.html import render
from slimstep.eval.pages.run_page import facts
from slimstep.eval.pages.runs import Model, RunRecord, read_run, run_names
from slimstep.eval.pages.tables import Table
from slimstep.eval.pages.text import count, difference, digits, display_name, percent, score

BEFORE_A_CHOICE = {"precision": "float32"}  # of protocols that do not say theirs
COLUMNS = ["parameters", "GFLOPs", "denoiser ms", "of teacher", "CLIP ± se", "against teacher"]


def run_table(folder: str | Path) -> str:
    """The models of one finished run as a table for a terminal: the teacher, every round, the student."""
    models = finished_run(folder).models
    ratios = by_ratio(models)
    rows = [[*cells(display_name(model.model), model, models[0], model.versus_reference),
             *(over_the_reference(model, name) for name in ratios)] for model in models]  # fmt: skip
    return Table(["model", *COLUMNS, *(f"{name} over teacher's" for name in ratios)], rows).console


def compare_runs(folders: Sequence[str | Path], out: str | Path) -> str:
    """Writes `out`/report.html, table.md and clip-against-latency.png; returns the table for a terminal.

    Students are compared with their own teacher, and with the student of the first run, prompt by prompt; runs whose
    scores come from other prompts or another protocol are listed, and not compared.
    Raises FileNotFoundError for a missing run, ValueError for one that has not been evaluated yet.
    """
    out, records = Path(out), [finished_run(folder) for folder in folders]
    runs = dict(zip(run_names([record.path for record in records]), records, strict=True))
    first_name, first = next(iter(runs.items()))
    rows = without_repeated_teachers([row for name, run in runs.items() for row in run_rows(name, run, first)])
    header, classes = ["run", *COLUMNS, f"against {first_name}"], [row["kind"] for row in rows]
    table = Table(header, [row["cells"] for row in rows], row_classes=classes)
    figure = pareto_figure(points(rows), "denoiser latency, % of the teacher's in the same run")
    save_png(figure, out / "clip-against-latency.png")
    write_text(out / "table.md", table.markdown)
    page = render(
        "comparison.html.j2",
        cautions=cautions_of({name: run.path for name, run in runs.items()}),
        title=", ".join(runs),
        table=table,
        figure=Markup(themed(figure, "comparison")),
        differences=protocol_differences({name: metric(run) for name, run in runs.items()}),
        facts=facts_that_differ({name: facts(run) for name, run in runs.items()}),
    )
    write_text(out / "report.html", page)
    return table.console


def finished_run(folder: str | Path) -> RunRecord:
    run = read_run(folder)
    if not run.evaluation:
        raise ValueError(f"{run.path} has no evaluation.json: the run is not finished; its command again continues it")
    return run


def metric(run: RunRecord) -> tuple[str, dict[str, Any]]:
    """What makes the scores of two runs comparable: the prompts, and the protocol."""
    return run.evaluation.prompts_hash, {**BEFORE_A_CHOICE, **run.evaluation.protocol}


def protocol_differences(metrics: Mapping[str, tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A line for each run whose scores are not those of the first run's metric, saying in what they differ."""
    (_, (first_prompts, first_protocol)), *others = metrics.items()
    lines = []
    for name, (prompts, protocol) in others:
        keys = [key for key in {**protocol, **first_protocol} if protocol.get(key) != first_protocol.get(key)]
        changed = ["prompts"] * (prompts != first_prompts) + keys
        if changed:
            lines.append(f"{name} was scored with other {', '.join(changed)}")
    return lines


def run_rows(name: str, run: RunRecord, first: RunRecord) -> list[dict[str, Any]]:
    """The lines of a run's teacher and student."""
    teacher, student = run.models[0], run.models[-1]
    return [
        {"name": f"teacher of {name}", "kind": "teacher", "model": teacher, "teacher_ms": teacher.ms,
         "cells": [*cells(f"teacher of {name}", teacher, teacher, None), difference(None)]},
        {"name": name, "kind": "student", "model": student, "teacher_ms": teacher.ms,
         "cells": [*cells(name, student, teacher, student.versus_reference), difference(versus_first(run, first))]},
    ]  # fmt: skip


def versus_first(run: RunRecord, first: RunRecord) -> dict[str, float] | None:
    """The paired difference to the first run's student, where there is one."""
    if run is first or metric(run) != metric(first):
        return None
    scores = [r.models[-1].clip["per_prompt"] for r in (run, first)]
    return vars(paired_difference(*scores))


def cells(name: str, model: Model, teacher: Model, to_teacher: Mapping | None) -> list[str]:
    """A model's line: `COLUMNS`, after its name."""
    return [
        name,
        count(model.parameters),
        digits(model.gflops),
        digits(model.ms),
        percent(model.ms / teacher.ms),
        score(model.clip),
        difference(to_teacher),
    ]


def facts_that_differ(facts: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Mapping[str, Any]]:
    """Of {run: {title: table}}, the first table of each title whole; of later runs', what is different there."""
    first, tables = {}, {}
    for name, known in facts.items():
        for title, table in known.items():
            if title not in first:
                first[title] = tables[f"{title} ({name})"] = table
            elif changed := {key: value for key, value in table.items() if first[title].get(key) != value}:
                tables[f"{title} ({name}), where it differs"] = changed
    return tables


def without_repeated_teachers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of one teacher show it once; the latency shown is the first run's."""
    seen: list[Any] = []
    kept = []
    for row in rows:
        scores = row["model"].clip["per_prompt"]
        if row["kind"] == "teacher" and scores in seen:
            continue
        seen += [scores] if row["kind"] == "teacher" else []
        kept.append(row)
    return kept


def points(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The rows in the plane of latency and score; a colour for each run. Latencies are in percent of the run's own
    teacher's: runs are timed apart, and a machine is not as fast at all hours."""
    students = [row["name"] for row in rows if row["kind"] == "student"]
    made = []
    for row in rows:
        model = row["model"]
        colour = TEACHER if row["kind"] == "teacher" else SERIES[students.index(row["name"]) % len(SERIES)]
        share = 100 * model.ms / row["teacher_ms"]
        made.append(Point(row["name"], share, model.clip["mean"], model.clip["se"], row["kind"], colour))
    return made
