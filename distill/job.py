"""The distilling job (SnapFusion, section 4): from a teacher's 32 steps down a ladder, every rung a pipeline."""

import logging

from PIL import Image

from slimstep.distill.bench import DistillBench
from slimstep.distill.config import Config
from slimstep.distill.curves import Curves
from slimstep.distill.plan import distilling_stages, trainings
from slimstep.engine.planning import Plan
from slimstep.engine.run import Run
from slimstep.eval.pages.steps_page import HEADER, curves_table, point_rows, timed_points, write_steps_report
from slimstep.eval.plan import planned, scorer_stage
from slimstep.eval.scorer_check import check_scorer

log = logging.getLogger("slimstep")


def distill_steps(config: Config, run: Run) -> int | Plan:
    """Runs or continues the job, or tells what it would do; returns exit code 0."""
    bench = DistillBench(config, run)
    bench.check()
    if config.plan:
        return planned(bench, [*scorer_stage(bench), *distilling_stages(bench)], trainings(bench))
    check_scorer(bench)
    bench.learn_velocity()
    bench.repair()
    for climb in bench.climbs:
        bench.climb(climb)
    curves, page = Curves(bench), run.path / "report.html"
    evaluation = curves.evaluate()
    bench.write_cards(evaluation)
    curves.measure_unets()
    new = not run.made(page.name)
    if run.accelerator.is_main_process:
        if new:
            write_steps_report(run.path, lambda: track(run))
        print(curves_table(evaluation))
        log.info(f"report: {page.resolve()}{'' if new else ' (finished before; nothing was made anew)'}")
    run.accelerator.wait_for_everyone()
    return 0


def track(run: Run) -> None:
    """The curves as a table, and the report's pictures, for a tracker if there is one."""
    if run.tracker:
        run.tracker.table("curves", HEADER, point_rows(timed_points(run.path)))
        for path in sorted((run.path / "report").glob("*.png")):
            run.tracker.images(f"report/{path.stem}", [Image.open(path).convert("RGB")], [path.stem])
