"""The stages of the distilling job, with what each costs."""

from collections.abc import Iterator

from slimstep.distill.network import Distillation
from slimstep.distill.stages import DistillationStage
from slimstep.engine.config import TrainConfig
from slimstep.engine.objective import Cost
from slimstep.eval.plan import Stage, export, image_count, image_rows, training
from slimstep.eval.record import FILE


def distilling_stages(job: Distillation) -> Iterator[Stage]:
    """All stages in the order in which they run; a consistency objective runs one teacher step, others several."""
    teacher, config = job.teacher, job.teacher.config
    if not job.predicts_v:
        for name in ("teacher", "student") if job.distillation.student else ("teacher",):
            train = config.v_prediction.train
            yield training(f"velocity-{name}", train, teacher, f"{name}, by the data", Cost(rows=0))
    if job.distillation.recover:
        yield training("repair", config.recovery.train, teacher, "student, by the teacher")
    for stage in job.stages:
        work = f"{stage.start}, by {stage.teacher} with {stage.teacher_steps} steps"
        yield training(stage.name, job.training(stage.name), teacher, work, cost(job, stage))
        yield export(f"{stage.name}/export", teacher)
    yield evaluation(job)
    yield Stage("unet_ms.json", "evaluations of one row and of two")
    yield Stage("report.html", "")


def cost(job: Distillation, stage: DistillationStage) -> Cost:
    """What the objective says of itself; one that says nothing follows the teacher's steps within one of its own."""
    return getattr(job.checked_objective(stage), "cost", Cost(stage.teacher_steps // stage.steps))


def trained_beside(job: Distillation) -> int:
    """The most weights that any stage trains beside its student."""
    return max((cost(job, stage).beside for stage in job.stages), default=0)


def evaluation(job: Distillation) -> Stage:
    """Every model at every number of steps and guidance scale."""
    config, points, rows = job.teacher.config, 0, 0
    for guidance in config.curves.guidance:
        for name in job.evaluated:
            if guidance not in job.evaluated_guidance(name):
                continue
            embedded = name.startswith("steps-") and job.distillation.guidance_embed_dim
            scale, steps = job.sampled_guidance(name, guidance), job.evaluated_steps(name)
            points += len(steps)
            rows += image_count(config) * sum(n if embedded else image_rows(n, scale) for n in steps)
    return Stage(FILE, f"{points} points of {image_count(config)} images", rows)


def trainings(job: Distillation) -> list[TrainConfig]:
    """What the stages train with, for their memory."""
    config = job.teacher.config
    trains = [config.v_prediction.train] if not job.predicts_v else []
    trains += [config.recovery.train] if job.distillation.recover else []
    return trains + [job.training(stage.name) for stage in job.stages]
