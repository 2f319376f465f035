"""Evaluations, benchmarks of all kinds and pipelines tables on one page: what images lose, and what time is saved."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from slimstep.engine.files import write_text
from slimstep.eval.metrics.compare import PairedDifference
from slimstep.eval.pages.cautions import cautions_of
from slimstep.eval.pages.comparison import facts_that_differ, protocol_differences
from slimstep.eval.pages.evaluation_page import columns
from slimstep.eval.pages.figures import grid_figure, save_figures, themed
from slimstep.eval.pages.gathered import Gathered
from slimstep.eval.pages.headline import headline, tiles
from slimstep.eval.pages.html import render
from slimstep.eval.pages.pareto import key, speedup
from slimstep.eval.pages.results import SPEED_KINDS, common_settings, metric, pair_matrix, setting, setting_text
from slimstep.eval.pages.results_figures import draw_sections, image_grid, untimed
from slimstep.eval.pages.speed_page import rows_table
from slimstep.eval.pages.tables import Table
from slimstep.eval.pages.text import difference, digits


def compare_results(folders: Sequence[str | Path], out: str | Path) -> str:
    """Writes `out`/report.html, table.md and figures/*.png; returns the tables for a terminal.

    Scores of other prompts, another scorer or seed than the first evaluation's are listed, and not compared.
    Raises FileNotFoundError for a run that is missing or unfinished, ValueError for one whose results are damaged.
    """
    gathered, out = Gathered(folders), Path(out)
    sections, grid = draw_sections(gathered), image_grid(gathered)
    models, pairs, speeds = models_table(gathered), pair_tables(gathered), speed_tables(gathered)
    figures = {picture.name: picture.figure for picture in itertools.chain(*sections.values())}
    if grid:
        rows = [(row["label"], row["paths"]) for row in grid["rows"]]
        figures["images"] = grid_figure(rows, grid["prompts"])
    save_figures(out / "figures", figures)
    metrics = {name: metric(results) for name, results in gathered.evaluations.items()}
    page = render(
        "results.html.j2",
        cautions=cautions_of({name: run.path for name, run in gathered.runs.items()}),
        title=title(gathered),
        headline=headline(gathered),
        tiles=tiles(gathered),
        gathered=gathered,
        sections={
            name: [(picture.heading, Markup(themed(picture.figure, picture.name))) for picture in pictures]
            for name, pictures in sections.items()
        },
        untimed=untimed(gathered),
        grid=grid,
        models=models,
        pairs=pairs,
        speeds=speeds,
        differences=protocol_differences(metrics) if metrics else [],
        facts=facts_that_differ({name: run.facts for name, run in gathered.runs.items()}),
    )
    tables = [*models, *pairs, *speeds]
    write_text(out / "table.md", "\n".join(titled(t, t.markdown) for t in tables))
    write_text(out / "report.html", page)
    return "\n".join(titled(t, t.console) for t in tables)


def titled(table: Table, text: str) -> str:
    return f"## {table.title}\n\n{text}"


def title(gathered: Gathered) -> str:
    """The models by name where they are few; runs, where nothing was evaluated."""
    if not gathered.points:
        return ", ".join(gathered.runs)
    reference = gathered.reference.label
    others = list(dict.fromkeys(p.label for p in gathered.compared if p.label != reference))
    if not others:
        return reference
    return f"{', '.join(others) if len(others) < 5 else f'{len(others)} models'} against {reference}"


# ---- tables ----


def models_table(gathered: Gathered) -> list[Table]:
    """All models at all settings, with their times where they were timed; no table where nothing was evaluated."""
    if not gathered.points:
        return []
    shown = {"model": lambda p: p.label}
    shown |= {name: cell for name, cell in columns(gathered.points).items() if name != "model"}
    if gathered.timed:
        shown["ms an image"] = lambda p: digits(gathered.time(p).ms) if gathered.time(p) else "–"
        shown["speed-up"] = lambda p: speedup(gathered.time(p), gathered.reference_time(p)) if gathered.time(p) else "–"
    if len(gathered.evaluations) > 1:
        shown["evaluation"] = lambda p: p.run
    classes = [
        "teacher" if key(p) == gathered.reference_of(p) else "" if p.compared else "step" for p in gathered.points
    ]
    return [Table.of(shown, gathered.points, labels=3, title="All models", row_classes=classes)]


def pair_tables(gathered: Gathered) -> list[Table]:
    """At every setting that several models share: how much higher the row's model scores than the column's."""
    tables = []
    for chosen in common_settings(gathered.compared):
        points = [point for point in gathered.compared if setting(point) == chosen]
        matrix, labels = pair_matrix(points), [point.label for point in points]
        rows = [[label, *(difference(d and vars(d)) for d in line)] for label, line in zip(labels, matrix, strict=True)]
        classes = [["", *map(side, line)] for line in matrix]
        header = ["row − column", *labels]
        title = f"Every two models at {setting_text(chosen)}"
        tables.append(Table(header, rows, title=title, cell_classes=classes))
    return tables


def side(d: PairedDifference | None) -> str:
    """Whether the interval excludes zero, and on which side."""
    if d is None or d.low <= 0 <= d.high:
        return ""
    return "higher" if d.low > 0 else "lower"


def speed_tables(gathered: Gathered) -> list[Table]:
    """All rows of the benchmarks, cumulative benchmarks and pipelines tables."""
    return [rows_table(results, name) for kind in SPEED_KINDS for name, results in gathered.of_kind(kind).items()]
