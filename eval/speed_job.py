"""The speed jobs: benchmark, ladder, pipelines. One process, one device, every row a file."""

import logging

from PIL import Image

from slimstep.engine.console import print_for_programs
from slimstep.engine.planning import Plan
from slimstep.engine.run import Run
from slimstep.eval.benchmarking import SpeedBench
from slimstep.eval.config import Config
from slimstep.eval.pages.speed_page import cells, console_text, header, summary, write_speed_report
from slimstep.eval.speed_tables import TABLES

log = logging.getLogger("slimstep")


def benchmark(config: Config, run: Run) -> int | Plan:
    """Pipelines in every combination of setups."""
    return make_table("benchmark", config, run)


def ladder(config: Config, run: Run) -> int | Plan:
    """Optimisations one upon the other."""
    return make_table("ladder", config, run)


def pipelines(config: Config, run: Run) -> int | Plan:
    """Tasks, models and batches."""
    return make_table("pipelines", config, run)


for job in (benchmark, ladder, pipelines):
    job.one_process = True


def make_table(kind: str, config: Config, run: Run) -> int | Plan:
    """Runs or continues a job; returns exit code 0. The last line printed is JSON, where stdout is no terminal."""
    bench = SpeedBench(config, run)
    if config.plan:
        made = len(list(run.path.glob("rows/**/*.json")))
        return Plan(f"run   {run.path}\nrows  {made} made; each takes at most {config.latency.seconds:g} s of timing")
    results, page = bench.results(kind, TABLES[kind](bench)), run.path / "report.html"
    if new := not page.exists():
        write_speed_report(run.path, lambda: track(run, kind))
    print(console_text(results))
    log.info(f"report: {page.resolve()}{'' if new else ' (finished before; nothing was made anew)'}")
    print_for_programs({"run": str(run.path.resolve()), **summary(results)})
    return 0


def track(run: Run, kind: str) -> None:
    """The table, and the report's pictures, for a tracker if there is one."""
    if run.tracker:
        results = run.load("results.json")
        run.tracker.table(kind, header(results), cells(results))
        for path in sorted((run.path / "report").glob("*.png")):
            run.tracker.images(f"report/{path.stem}", [Image.open(path).convert("RGB")], [path.stem])
