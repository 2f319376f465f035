"""The stages of the distilling job, with what each costs."""

from collections.abc import Iterator

from slimstep.distill.network import Distillation
from slimstep.engine.config import TrainConfig
from slimstep.eval.plan import Stage, export, image_rows, training
from slimstep.eval.record import FILE


def distilling_stages(job: Distillation) -> Iterator[Stage]:
    """All stages in the order in which they run; a consistency objective runs one teacher step, others several."""
    teacher, config = job.teacher, job.teacher.config
    if not job.predicts_v:
        for name in ("teacher", "student") if job.ladder.student else ("teacher",):
            yield training(f"velocity-{name}", config.velocity.train, teacher, taught=0, work=f"{name}, by the data")
    if job.ladder.repair:
        yield training("repair", config.recovery.train, teacher, work="student, by the teacher")
    for climb in job.climbs:
        one_step = job.ladder.sampler == "LCMScheduler"
        taught = 1 if one_step else climb.teacher_steps // climb.steps
        work = f"{climb.start}, by {climb.teacher} with {climb.teacher_steps} steps"
        yield training(climb.name, job.training(climb.name), teacher, taught, work)
        yield export(f"{climb.name}/export", teacher)
    yield evaluation(job)
    yield Stage("unet_ms.json", "evaluations of one row and of two")
    yield Stage("report.html", "")


def evaluation(job: Distillation) -> Stage:
    """Every model at every number of steps and guidance scale."""
    config, points, rows = job.teacher.config, 0, 0
    for guidance in config.curves.guidance:
        for name in job.evaluated:
            embedded = name.startswith("steps-") and job.ladder.guidance_width
            steps = job.evaluated_steps(name)
            points += len(steps)
            rows += config.eval.prompts * sum(n if embedded else image_rows(n, guidance) for n in steps)
    return Stage(FILE, f"{points} points of {config.eval.prompts} images", rows)


def trainings(job: Distillation) -> list[TrainConfig]:
    """What the stages train with, for their memory."""
    config = job.teacher.config
    own = [config.velocity.train] if not job.predicts_v else []
    own += [config.recovery.train] if job.ladder.repair else []
    return own + [job.training(climb.name) for climb in job.climbs]
