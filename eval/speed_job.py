"""The speed jobs: benchmark, cumulative, pipelines. One process, one device, every row a file."""

from functools import partial

from slimstep.engine.console import print_for_programs
from slimstep.engine.planning import Plan
from slimstep.engine.renamed import with_new_kind
from slimstep.engine.run import Run
from slimstep.eval.benchmarking import Benchmark
from slimstep.eval.config import Config
from slimstep.eval.pages.speed_page import console_text, rows_table, summary, write_speed_report
from slimstep.eval.reporting import report, track_table
from slimstep.eval.speed_tables import TABLES


def benchmark(config: Config, run: Run) -> int | Plan:
    """Pipelines in every combination of inference options."""
    return make_table("benchmark", config, run)


def cumulative(config: Config, run: Run) -> int | Plan:
    """Optimisations one upon the other: the cumulative benchmark."""
    return make_table("cumulative", config, run)


def pipelines(config: Config, run: Run) -> int | Plan:
    """Tasks, models and batches."""
    return make_table("pipelines", config, run)


for job in (benchmark, cumulative, pipelines):
    job.one_process = True


def make_table(kind: str, config: Config, run: Run) -> int | Plan:
    """Runs or continues a job; returns exit code 0. The last line printed is JSON, where stdout is no terminal."""
    timed = Benchmark(config, run)
    if config.plan:
        made = len(list(run.path.glob("rows/**/*.json")))
        return Plan(f"run   {run.path}\nrows  {made} made; each takes at most {config.latency.seconds:g} s of timing")
    results = with_new_kind(timed.results(kind, TABLES[kind](timed)))
    track = partial(track_table, run, kind, rows_table(results))
    report(run, partial(write_speed_report, run.path, track), partial(console_text, results))
    print_for_programs({"run": str(run.path.resolve()), **summary(results)})
    return 0
