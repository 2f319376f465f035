"""The distilling job (SnapFusion, section 4): from a teacher's 32 steps down a ladder, every rung a pipeline."""

import logging

from distill.bench import DistillBench
from distill.curves import Curves
from engine.config import Config
from engine.run import Run
from eval.report import markdown_table

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
    evaluation = Curves(bench).evaluate()
    if run.accelerator.is_main_process:
        print(curves_table(evaluation))
    return 0


def print_plan(bench: DistillBench) -> int:
    """The rungs, which are done, and what each asks for."""
    rows = []
    for climb in bench.climbs:
        train = bench.training(climb.name)
        samples = train.steps * train.batch_size * train.accumulation * bench.run.accelerator.num_processes
        done = bench.run.made(f"{climb.name}/export")
        taught = f"{climb.teacher}, {climb.teacher_steps} steps"
        rows.append([climb.name, "done" if done else "to do", climb.start, taught, f"{train.steps:,}", f"{samples:,}"])
    if bench.run.accelerator.is_main_process:
        print(markdown_table(["rung", "state", "starts from", "taught by", "training steps", "samples"], rows))
        print(f"run   {bench.run.path}")
    return 0


def curves_table(evaluation: dict) -> str:
    """Per guidance scale and model: CLIP ± standard error at every number of steps."""
    points = evaluation["points"]
    steps = sorted({point["steps"] for point in points})
    cells = {
        (p["guidance"], p["model"], p["steps"]): f"{p['clip']['mean']:.1f} ± {p['clip']['se']:.1f}" for p in points
    }
    rows = [
        [model, f"{guidance:g}", *(cells[guidance, model, n] for n in steps)]
        for guidance, model in dict.fromkeys((p["guidance"], p["model"]) for p in points)
    ]
    return markdown_table(["model", "guidance", *(f"{n} steps" for n in steps)], rows)
