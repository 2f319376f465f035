"""The stages of the distilling job, with what each costs."""

from collections.abc import Iterator

from slimstep.distill.bench import DistillBench
from slimstep.distill.curves import Curves
from slimstep.engine.config import TrainConfig
from slimstep.eval.plan import Stage, export, image_rows, training


def distilling_stages(bench: DistillBench) -> Iterator[Stage]:
    """All stages in the order in which they run; a consistency objective runs one teacher step, others their rung's."""
    config = bench.config
    if not bench.predicts_velocity:
        for name in ("teacher", "student") if bench.ladder.student else ("teacher",):
            yield training(f"velocity-{name}", config.velocity.train, bench, taught=0, work=f"{name}, by the data")
    if bench.ladder.repair:
        yield training("repair", config.recovery.train, bench, work="student, by the teacher")
    for climb in bench.climbs:
        one_step = bench.ladder.sampler == "LCMScheduler"
        taught = 1 if one_step else climb.teacher_steps // climb.steps
        work = f"{climb.start}, by {climb.teacher} with {climb.teacher_steps} steps"
        yield training(climb.name, bench.training(climb.name), bench, taught, work)
        yield export(f"{climb.name}/export", bench)
    yield judgement(bench)
    yield Stage("unet_ms.json", "evaluations of one row and of two")
    yield Stage("report.html", "")


def judgement(bench: DistillBench) -> Stage:
    """Every model at every number of steps and guidance scale."""
    curves, prompts, points, rows = Curves(bench), bench.config.eval.prompts, 0, 0
    for guidance in bench.config.curves.guidance:
        for name in curves.names:
            told = name.startswith("steps-") and bench.ladder.guidance_width
            steps = curves.steps(name)
            points += len(steps)
            rows += prompts * sum(n if told else image_rows(n, guidance) for n in steps)
    return Stage("evaluation.json", f"{points} points of {prompts} images", rows)


def trainings(bench: DistillBench) -> list[TrainConfig]:
    """What the stages train with, for their memory."""
    config = bench.config
    own = [config.velocity.train] if not bench.predicts_velocity else []
    own += [config.recovery.train] if bench.ladder.repair else []
    return own + [bench.training(climb.name) for climb in bench.climbs]
