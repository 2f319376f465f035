"""The last page of the whole method: the student against its teacher, and what every stage made, in one table."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from slimstep.engine.console import print_for_programs
from slimstep.engine.files import write_json, write_text
from slimstep.engine.planning import Plan
from slimstep.engine.run import Run
from slimstep.eval.config import Config
from slimstep.eval.pages.cautions import cautions_of
from slimstep.eval.pages.html import write_page
from slimstep.eval.pages.outcome import Outcome
from slimstep.eval.pages.text import flatten, overlap_sentence
from slimstep.eval.reporting import track_table
from slimstep.models.card import origin_of, write_card

log = logging.getLogger("slimstep")


def report(config: Config, run: Run) -> int | Plan:
    """Writes report.html, table.md and summary.json, or tells that it would; returns exit code 0."""
    page = config.page
    if not (page.evaluation and page.benchmark):
        raise ValueError("page.evaluation and page.benchmark name the runs that the page is about: page.evaluation=DIR")
    if config.plan:
        return Plan(f"run   {run.path}\npage  of {page.evaluation} and {page.benchmark}")
    if run.accelerator.is_main_process:
        outcome = Outcome(page.evaluation, page.benchmark)
        write_report(outcome, run, page.stages)
        if origin_of(student := Path(str(outcome.evaluation.models[outcome.student_name]))):
            write_card(student, outcome.results())
        print(f"{outcome.against.console}\n{outcome.artifacts.console}")
        log.info(f"report: {(run.path / 'report.html').resolve()}")
        print_for_programs({"run": str(run.path.resolve()), **outcome.summary()})
    run.accelerator.wait_for_everyone()
    return 0


def write_report(outcome: Outcome, run: Run, stages: Sequence[str]) -> None:
    folder = run.path
    write_text(folder / "table.md", f"{outcome.against.markdown}\n{outcome.artifacts.markdown}")
    write_json(folder / "summary.json", outcome.summary())

    def track() -> None:
        if run.tracker:
            run.tracker.table("student against teacher", outcome.against.header, outcome.against.rows)
        track_table(run, "artifacts", outcome.artifacts)

    evaluation, facts = outcome.evaluation, ("models", "prompts", "n", "protocol", "environment")
    write_page(
        folder,
        "final.html.j2",
        outcome.figures(),
        track,
        cautions=cautions_of({name: folder.parent / name for name in stages}),
        name=folder.parent.name,
        outcome=outcome,
        seen=overlap_sentence(evaluation.n, evaluation.seen),
        clock=outcome.benchmark["protocol"]["clock"],
        stages=[(name, *command_and_link(folder.parent, name)) for name in stages],
        facts=flatten({key: getattr(evaluation, key) for key in facts}),
    )


def command_and_link(workflow: Path, stage: str) -> tuple[str, str | None]:
    """What made a stage, as the workflow has kept it, nothing for runs that no workflow has made; and the stage's own
    page as seen from here, where it has one."""
    record, page = workflow / "stages" / f"{stage}.json", workflow / stage / "report.html"
    command = json.loads(record.read_text())["command"] if record.is_file() else ""
    return command, f"../{stage}/report.html" if page.is_file() else None
