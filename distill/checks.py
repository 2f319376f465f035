"""What cannot be distilled, said before anything is trained."""

from hydra.utils import get_class

from slimstep.distill.config import DistillationConfig
from slimstep.distill.network import Distillation
from slimstep.eval.inputs import check_inputs, check_real_images
from slimstep.eval.training import check_objective
from slimstep.models.denoiser import guidance_embed_dim
from slimstep.models.families.quantized import check_computes
from slimstep.models.guidance import with_guidance_embedding
from slimstep.models.pipeline import one_line
from slimstep.models.schedulers import check_sampling


def check(job: Distillation) -> None:
    """ValueError, before anything is trained, for stages that cannot be trained or evaluated."""
    config, teacher = job.teacher.config, job.teacher
    check_agreement(job)
    check_inputs(teacher)
    check_real_images(config)
    for key in ("v_prediction", "recovery"):
        check_objective(f"{key}.objective", config[key].objective, config[key].train, teacher)
    for stage in job.stages:
        training = job.training(stage.name)
        job.checked_objective(stage)
        if training.keep_best and not (config.scorer and teacher.has_captions):
            lacking = "captions, and the prompts have none" if config.scorer else "a scorer; it has scorer=none"
            raise ValueError(f"train.keep_best=true of {stage.name} needs {lacking}")
        if job.is_few_step and (stage.teacher == "student" or job.objective(stage).get("teacher_mix")):
            where = f"distillation.student={job.distillation.student}"
            raise ValueError(f"{stage.name} asks {where} at all timesteps, and it learnt few of them")
    students = [name for name in job.evaluated if name.startswith("steps-")]
    for name, steps in [(student, steps) for student in students for steps in job.evaluated_steps(student)]:
        try:
            check_sampling(job.sampler(name, steps), steps, job.flow)
        except ValueError as error:
            raise ValueError(f"curves.steps={list(config.curves.steps)}: {one_line(error)}") from error
    if job.distillation.guidance_embed_dim:
        with_guidance_embedding(job.student, job.distillation.guidance_embed_dim)
    if job.distillation.quantize:
        check_quantized(job, job.distillation.quantize)


def check_quantized(job: Distillation, dtype: str) -> None:
    """ValueError where students cannot be trained in the dtype."""
    check_computes(dtype, job.teacher.device)
    if not set(job.student.quantizable_blocks) & set(job.student.kept_blocks):
        kind = type(job.student).__name__.removeprefix("Prunable")
        raise ValueError(f"distillation.quantize={dtype}: the {kind} has no linear layers that take tokens; set null")
    for stage in job.stages:
        if rank := job.training(stage.name).lora_rank:
            why = "a low-rank update is added to weights of which the rounded ones count"
            raise ValueError(f"distillation.quantize={dtype} and train.lora_rank={rank} of {stage.name}: {why}; set 0")


def check_agreement(job: Distillation) -> None:
    """ValueError where the objective does not train the students that `distillation` describes."""
    kind, distillation = get_class(job.teacher.config.objective["_target_"]), job.distillation
    requires = job.requires
    if not requires.distils_steps:
        others = "steps, guidance, lcm, dmd, tdm, adversarial or scm"
        raise ValueError(f"objective {kind.__name__} distils no steps; choose objective={others}")
    for stage in job.stages if requires.guides_itself else ():
        scale, compared_at = job.own_guidance(stage), list(job.teacher.config.curves.guidance)
        if scale not in compared_at:
            way = f"curves.guidance={compared_at} needs it, for the teacher to compare with"
            raise ValueError(f"objective.guidance_scale={scale:g} is what students have in their weights; {way}")
    if job.is_continuous and requires.sampler:
        needed = f"needs {requires.sampler}, which neither flows nor EDM's networks have"
        raise ValueError(f"objective {kind.__name__} {needed}; choose objective=steps")
    if requires.sampler == "LCMScheduler" and len(job.stages) > 1:
        raise ValueError(f"objective {kind.__name__} has one stage, as distillation.steps=[32,4]; it serves all steps")
    without_embedding = {
        f"objective {kind.__name__}": not requires.guidance_embedding,
        "the conversion to v-prediction": not job.predicts_v,
        "distillation.recover": distillation.recover,
    }
    unguided = [name for name, is_requested in without_embedding.items() if is_requested]
    unets = {"teacher": job.teacher.unet, "student": job.student}
    embedded = [name for name, unet in unets.items() if guidance_embed_dim(unet)]
    if unguided and embedded:
        who, what = " and ".join(embedded), " and ".join(unguided)
        raise ValueError(f"the {who} has a guidance embedding, and {what} would not train it")
    if requires.guidance_embedding != bool(distillation.guidance_embed_dim):
        way = f"needs distillation.guidance_embed_dim{', as 256' if requires.guidance_embedding else '=0'}"
        raise ValueError(f"objective {kind.__name__} {way}")
    if job.is_continuous:
        if distillation.shift and not job.is_flow:
            what = f"distillation.shift={distillation.shift:g} is for flow matching"
            raise ValueError(f"{what}, and the teacher's scheduler is {type(job.scheduler).__name__}")
        if distillation.shift and job.scheduler.config.use_dynamic_shifting:
            what = f"distillation.shift={distillation.shift:g}: the teacher's {type(job.scheduler).__name__}"
            raise ValueError(f"{what} takes its shift from the resolution; set base_shift and max_shift there")
        if distillation.sampler != DistillationConfig.sampler:
            what = f"distillation.sampler={distillation.sampler} is for models with betas"
            raise ValueError(f"{what}; students of this teacher leave with its {type(job.scheduler).__name__}")
        return
    if distillation.shift:
        raise ValueError(f"distillation.shift={distillation.shift:g} is for flow matching, and the teacher has betas")
    if (requires.sampler or distillation.sampler) != distillation.sampler or (
        distillation.sampler == "LCMScheduler" and requires.sampler is None and not requires.guides_itself
    ):
        raise ValueError(f"objective {kind.__name__} trains no student for distillation.sampler={distillation.sampler}")
