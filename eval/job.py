"""The evaluation job: finished pipelines, ours or not, on the same prompts from the same noise."""

import logging

from PIL import Image

from slimstep.engine.console import print_for_programs
from slimstep.engine.planning import Plan
from slimstep.engine.run import Run
from slimstep.eval.config import Config
from slimstep.eval.evaluation import EvaluationBench
from slimstep.eval.pages.evaluation_page import header, rows, summary, write_evaluation_report
from slimstep.eval.pages.tables import console_table
from slimstep.eval.pages.text import overlap_sentence
from slimstep.eval.plan import Stage, image_rows, scorer_stage, stages_table, time_line
from slimstep.eval.scorer_check import check_scorer

log = logging.getLogger("slimstep")


def evaluate(config: Config, run: Run) -> int | Plan:
    """Runs or continues the job, or tells what it would do; returns exit code 0.

    The last line printed is JSON, where stdout is no terminal.
    """
    bench = EvaluationBench(config, run)
    bench.check()
    if config.plan:
        checked = scorer_stage(bench) if bench.has_images else []
        stages = [*checked, *evaluation_stages(bench)]
        time, hours = time_line(bench, stages, [])
        return Plan(f"{stages_table(run, stages)}\n{time}", hours)
    check_scorer(bench, has_images=bench.has_images)
    results, page = bench.evaluate(), run.path / "report.html"
    new = not run.made(page.name)
    if run.accelerator.is_main_process:
        if new:
            if seen := overlap_sentence(results):
                log.info(seen)
            write_evaluation_report(run.path, lambda: track(run))
        print(console_table(header(results), rows(results), labels=3))
        log.info(f"report: {page.resolve()}{'' if new else ' (finished before; nothing was made anew)'}")
        print_for_programs({"run": str(run.path.resolve()), **summary(results)})
    run.accelerator.wait_for_everyone()
    return 0


def evaluation_stages(bench: EvaluationBench):
    """One product per model and setting."""
    for name in bench.models:
        for guidance, steps in bench.settings_of(name):
            prompts = bench.config.eval.prompts
            product = f"judged/{name}/guidance-{guidance}-steps-{steps}.json"
            yield Stage(product, f"{prompts} images", prompts * image_rows(steps, guidance))
    yield Stage("report.html", "")


def track(run: Run) -> None:
    """The table, and the report's pictures, for a tracker if there is one."""
    if run.tracker:
        results = run.load("results.json")
        run.tracker.table("models", header(results), rows(results))
        for path in sorted((run.path / "report").glob("*.png")):
            run.tracker.images(f"report/{path.stem}", [Image.open(path).convert("RGB")], [path.stem])
