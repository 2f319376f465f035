"""The distilling job (SnapFusion, section 4): from a teacher's 32 steps down a ladder, every rung a pipeline."""

import logging

from PIL import Image

from distill.bench import DistillBench
from distill.curves import Curves
from engine.config import Config
from engine.loop import trained
from engine.run import Run
from eval.report import markdown_table
from eval.steps_report import HEADER, curves_table, point_rows, timed_points, write_steps_report

log = logging.getLogger("slimstep")


def distill_steps(config: Config, run: Run) -> int:
    """Runs or continues the job, or tells what it would do; returns exit code 0."""
    bench = DistillBench(config, run)
    bench.check()
    if config.plan:
        return print_plan(bench)
    bench.learn_velocity()
    bench.repair()
    for climb in bench.climbs:
        bench.climb(climb)
    curves, page = Curves(bench), run.path / "report.html"
    evaluation = curves.evaluate()
    curves.measure_unets()
    new = not run.made(page.name)
    if run.accelerator.is_main_process:
        if new:
            write_steps_report(run.path)
            track(run)
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


def print_plan(bench: DistillBench) -> int:
    """The stages, which are done, and what each asks for."""
    config, networks = bench.config, ("teacher", "student") if bench.ladder.student else ("teacher",)
    stages = [] if bench.predicts_velocity else [(f"velocity-{n}", n, "data", config.velocity.train) for n in networks]
    stages += [("repair", "student", "teacher", config.recovery.train)] if bench.ladder.repair else []
    stages += [
        (climb.name, climb.start, f"{climb.teacher}, {climb.teacher_steps} steps", bench.training(climb.name))
        for climb in bench.climbs
    ]
    rows = []
    for name, start, teacher, train in stages:
        samples = train.steps * train.batch_size * train.accumulation * bench.run.accelerator.num_processes
        state = "done" if trained(bench.run, name) else "to do"
        rows.append([name, state, start, teacher, f"{train.steps:,}", f"{samples:,}"])
    if bench.run.accelerator.is_main_process:
        print(markdown_table(["stage", "state", "starts from", "taught by", "training steps", "samples"], rows))
        print(f"run   {bench.run.path}")
    return 0
