"""What all stages of a step distillation share: the teacher on the time grid, the student, schedulers, the stages."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import diffusers
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from slimstep.distill.config import DistillationConfig, StageChanges
from slimstep.distill.stages import DistillationStage, distillation_stages, with_changes
from slimstep.distill.teaching import StepSchedule
from slimstep.engine.config import TrainConfig
from slimstep.engine.objective import Objective, Requirements, requirements
from slimstep.eval.inputs import Teacher
from slimstep.eval.training import check_objective
from slimstep.models.architecture import WHOLE
from slimstep.models.denoiser import guidance_embed_dim, takes_guidance
from slimstep.models.edm import is_edm, preconditioning_of
from slimstep.models.families.prunable import Prunable
from slimstep.models.family import flow_of, schedule_for
from slimstep.models.flow import (
    FlowSteps,
    eulers,
    from_config,
    is_continuous,
    is_flow,
    prediction_type_of,
    stretched,
)
from slimstep.models.guidance import with_fixed_guidance
from slimstep.models.networks import network_of, trained_steps_of
from slimstep.models.noise_schedule import NoiseSchedule, are_among, schedule_of
from slimstep.models.pipeline import load_pipeline, one_line
from slimstep.models.schedulers import ThresholdedDDIM, check_noise_schedule, class_for, on_same_schedule, stated
from slimstep.models.sizes import native_frames, native_pixels, set_resolution

log = logging.getLogger("slimstep")
SOLVERS_OWN = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "algorithm_type", "final_sigmas_type",
)  # fmt: skip
UNLIMITED = {"thresholding": False}
SAME_IN_BOTH = ("in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim",
                "caption_channels")  # fmt: skip


@dataclass(frozen=True)
class Distillation:
    """The teacher samples by DDIM whose last step ends in clean latents, or, where it learnt a flow or EDM's F, by
    Euler's steps with its own shift or σ; `student` is the network that learns, as it is in its folder. `is_few_step`:
    whether it was distilled before, to few steps or to take its guidance."""

    teacher: Teacher
    distillation: DistillationConfig
    stages: tuple[DistillationStage, ...]
    student: Prunable
    is_few_step: bool = False

    @property
    def is_flow(self) -> bool:
        """Whether the teacher learnt a flow."""
        return is_flow(self.teacher.pipeline.scheduler)

    @property
    def is_continuous(self) -> bool:
        """Whether the teacher learnt a flow or EDM's F: its scheduler is that of all networks."""
        return is_continuous(self.teacher.pipeline.scheduler)

    @property
    def flow(self) -> FlowSteps | None:
        """How the teacher's pipeline makes the steps of a flow."""
        return flow_of(self.teacher.pipeline) if self.is_flow else None

    @property
    def predicts_v(self) -> bool:
        """Whether the teacher needs no conversion to v-prediction first."""
        return prediction_type_of(self.teacher.pipeline.scheduler) != "epsilon"

    @property
    def scheduler(self) -> diffusers.SchedulerMixin:
        """What networks are trained and sampled with, as teachers too; ε-prediction has become v."""
        if self.is_continuous:
            return self.teacher.pipeline.scheduler
        changes = {} if self.predicts_v else {"prediction_type": "v_prediction"}
        return on_the_grid(self.distillation, diffusers.DDIMScheduler, self.teacher.pipeline.scheduler, **changes)

    @property
    def schedule(self) -> NoiseSchedule:
        return schedule_for(self.teacher.pipeline, self.scheduler, self.teacher.device)

    @property
    def shifted(self) -> Any:
        """A flow's scheduler with `distillation.shift`, where that is given."""
        shift = self.distillation.shift
        return from_config(self.scheduler, shift=shift) if shift else self.scheduler

    @property
    def requires(self) -> Requirements:
        """What the objective asks of its students."""
        return requirements(get_class(self.teacher.config.objective["_target_"]))

    def stage(self, name: str) -> DistillationStage:
        return next(stage for stage in self.stages if stage.name == name)

    def guides_itself(self, name: str) -> bool:
        """Whether one of `evaluated` is a student that has the guidance in its weights."""
        return self.requires.guides_itself and name.startswith("steps-")

    def sampled_guidance(self, name: str, guidance: float) -> float:
        """The scale with which one of `evaluated` is sampled where the teacher is with `guidance`."""
        return 1.0 if self.guides_itself(name) and not takes_guidance(self.student) else guidance

    def compared_guidance(self, name: str) -> float:
        """The teacher's scale that a stage's student is exported for: its own, or the evaluation's."""
        own = self.guides_itself(name)
        return self.own_guidance(self.stage(name)) if own else self.teacher.config.eval.guidance_scale

    def student_scheduler(self, steps: int) -> Any:
        """The diffusers scheduler that a student of so many steps is exported with; each of them removes noise."""
        if self.is_continuous:
            return stretched(self.shifted, steps, self.flow)
        objective, options = self.teacher.config.objective, self.requires.sampler_options
        kwargs = {option: objective[key] for option, key in options.items() if key in objective}
        kind = getattr(diffusers, self.distillation.sampler)
        if self.renoises:  # by itself it would start steps of a grid of 50, between those that are trained
            kwargs["original_inference_steps"] = steps
        return on_the_grid(self.distillation, kind, self.scheduler, **kwargs, **UNLIMITED)

    @property
    def renoises(self) -> bool:
        """Whether students of few steps add new noise between them, as LCM's scheduler does."""
        return self.requires.guides_itself and self.distillation.sampler == "LCMScheduler"

    def changes(self, name: str) -> StageChanges:
        """What is different in one stage."""
        return (self.distillation.stages or {}).get(name, StageChanges())

    def training(self, name: str) -> TrainConfig:
        """`train` with what `distillation.stages` says of this stage. ValueError for unknown keys and wrong types."""
        changes, train = self.changes(name).train, OmegaConf.to_container(self.teacher.config.train)
        try:
            return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), train, changes))
        except OmegaConfBaseException as error:
            message = f"distillation.stages.{name}.train={changes}: {one_line(error)}; train has {sorted(train)}"
            raise ValueError(message) from error

    def objective(self, stage: DistillationStage) -> DictConfig:
        """`objective` with what `distillation.stages` says of this stage."""
        return OmegaConf.merge(self.teacher.config.objective, self.changes(stage.name).objective)

    def checked_objective(self, stage: DistillationStage) -> Objective:
        """The objective of a stage, of no data. ValueError where it cannot be, or be trained in this way."""
        options: dict[str, Any] = {"schedule": self.schedule, "step_schedule": self.step_schedule(stage)}
        if self.requires.initial_student:
            options["initial_student"] = lambda: self.student
        kwargs = {"is_monitored": True, **options}
        return check_objective("objective", self.objective(stage), self.training(stage.name), self.teacher, **kwargs)

    def is_low_rank_of_teacher(self, stage: DistillationStage) -> bool:
        """Whether a student is the user's own teacher and a low-rank update, which then can be had alone, where the
        pipeline reads LoRAs."""
        if not hasattr(self.teacher.pipeline, "save_lora_weights"):
            return False
        is_teachers = self.student is self.teacher.unet and self.predicts_v and stage.start in ("student", "teacher")
        return is_teachers and self.training(stage.name).lora_rank > 0 and not self.distillation.guidance_embed_dim

    def step_schedule(self, stage: DistillationStage) -> StepSchedule:
        teacher = self.scheduler if self.is_continuous else self.of_a_teacher(stage.teacher)
        return StepSchedule(teacher, stage.teacher_steps, self.student_scheduler(stage.steps), stage.steps)

    def of_a_teacher(self, name: str) -> Any:
        """The scheduler by whose steps a stage's teacher is followed: a student's knows no dynamic thresholding."""
        changes = {} if name in ("teacher", "student") else UNLIMITED
        return on_the_grid(self.distillation, diffusers.DDIMScheduler, self.scheduler, **changes)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The models that are evaluated, in order: the teacher's samplers, the teacher converted to v, a student of
        another network before its distillation, the students of few steps."""
        teachers = ["teacher"] + ([] if self.is_continuous else ["teacher-dpm"])
        teachers += [] if self.predicts_v else ["teacher-v"]
        if self.is_continuous and stretched(self.shifted, 2, self.flow) is not self.scheduler:
            teachers.append("teacher-stretched")
        undistilled = ["student"] if self.distillation.student and not self.is_few_step else []
        return *teachers, *undistilled, *(stage.name for stage in self.stages if stage.name.startswith("steps-"))

    def evaluated_steps(self, name: str) -> list[int]:
        """At which a model is evaluated, most first; the teacher at the reference's, too, and an undistilled student at
        these alone.

        A scheduler with `shift_terminal` cannot make one step (models/flow.py).
        """
        if name == "student":
            return [self.distillation.steps[0]]
        more = {self.distillation.steps[0]} if name == "teacher" else set()
        steps = sorted({*self.teacher.config.curves.steps, *more}, reverse=True)
        if name == "teacher":
            return steps
        if self.guides_itself(name):  # it learnt so many, and is no solver of more
            steps = [n for n in steps if n <= self.stage(name).steps]
        return [n for n in steps if n > 1 or not self.sampler(name, 2).config.get("shift_terminal")]

    def evaluated_guidance(self, name: str) -> list[float]:
        """The teacher's guidance scales at which a model is compared with it; a student that has one in its weights at
        this one alone."""
        if self.guides_itself(name):
            return [self.own_guidance(self.stage(name))]
        return list(self.teacher.config.curves.guidance)

    def own_guidance(self, stage: DistillationStage) -> float:
        """What a stage's student has in its weights."""
        objective = self.objective(stage)
        return objective.get("guidance_scale", get_class(objective["_target_"]).guidance_scale)

    def sampler(self, name: str, steps: int) -> Any:
        """The scheduler with which one of `evaluated` makes so many steps."""
        own = self.teacher.pipeline.scheduler
        match name:
            case "teacher":
                return own
            case "teacher-dpm":
                return on_the_grid(self.distillation, diffusers.DPMSolverMultistepScheduler, own)
            case "teacher-v" | "student":
                return self.scheduler
            case "teacher-stretched":
                return stretched(self.shifted, steps, self.flow)
        return self.student_scheduler(self.stage(name).steps)


def distillation_of(teacher: Teacher) -> Distillation:
    """Raises ValueError for stages that cannot be, and for a student that does not fit the teacher's pipeline."""
    distillation: DistillationConfig = OmegaConf.to_object(teacher.config.distillation)
    guides_itself = requirements(get_class(teacher.config.objective["_target_"])).guides_itself
    stages = distillation_stages(distillation.steps, distillation.mode, not distillation.student, guides_itself)
    stages = with_changes(stages, distillation.stages or {})
    pipeline = teacher.pipeline
    trained_N = schedule_for(pipeline).trained_N  # by its own scheduler
    if is_continuous(pipeline.scheduler):
        pipeline.register_modules(scheduler=eulers(pipeline.scheduler))
    else:
        pipeline.scheduler = on_the_grid(distillation, diffusers.DDIMScheduler, pipeline.scheduler)
    student, is_few_step = student_of(teacher, distillation)
    if guides_itself and guidance_embed_dim(student):
        scale = Distillation(teacher, distillation, stages, student).own_guidance(stages[0])
        log.info(f"distillation.student={distillation.student} takes its guidance scale: it starts at {scale:g}")
        student = with_fixed_guidance(student, scale).requires_grad_(False)
    job = Distillation(teacher, distillation, stages, student, is_few_step)
    if trained_N is not None:
        check_few_step_teacher(job, trained_N)
    return job


def check_few_step_teacher(job: Distillation, trained_N: Tensor) -> None:
    """ValueError where a teacher that was distilled to a few steps is asked for what it never learnt.

    `trained_N` are its timesteps. It can make fewer steps of its own ones, by DDIM or by Euler's method.
    """
    steps, grid = job.distillation.steps, job.schedule.grid(job.scheduler, job.distillation.steps[0])[:, 0]
    kind, why = get_class(job.teacher.config.objective["_target_"]).__name__, None
    if job.requires.guides_itself or job.requires.sampler == "LCMScheduler":
        why = f"objective {kind} asks a teacher at all timesteps"
    elif not job.predicts_v:
        why = "it predicts ε: the conversion to v-prediction would train it on means of the data"
    elif not are_among(grid, trained_N, job.schedule):
        starts, learnt = (", ".join(f"{t:.4g}" for t in times.tolist()) for times in (grid, trained_N))
        why = f"distillation.steps={list(steps)} asks it at [{starts}], where it learnt [{learnt}]"
    if why:
        few = f"{job.teacher.config.model.name_or_path} was distilled to {len(trained_N)} steps (model.trained_steps)"
        raise ValueError(
            f"{few}, and {why}; prune it as it is by +experiment=prune_few_step, or distil the model of many steps "
            "that it was made of, with a pruned one as distillation.student"
        )


def on_the_grid(distillation: DistillationConfig, kind: type, scheduler: Any, **changes: Any) -> Any:
    """A scheduler of this kind on the same noise schedule; x̂ is not clipped, for training does not clip it.

    Dynamic thresholding stays: targets follow a teacher's steps with it, and so students, which land where these do,
    are sampled without (UNLIMITED).
    Raises ValueError where there is no noise schedule, or this kind cannot keep it.
    """
    check_noise_schedule(scheduler)
    kind = class_for(kind, scheduler)
    kept = {key: value for key, value in stated(scheduler).items() if key not in SOLVERS_OWN}
    grid = {"timestep_spacing": distillation.timestep_spacing, "set_alpha_to_one": True}
    config = {**kept, "clip_sample": False, **grid, **changes}
    if kind is diffusers.DDIMScheduler and config.get("thresholding"):
        kind = ThresholdedDDIM
    return on_same_schedule(kind, scheduler, config)


def student_of(teacher: Teacher, distillation: DistillationConfig) -> tuple[Prunable, bool]:
    """The network that learns, as it was loaded, and whether it was distilled before. ValueError where it does not fit
    the teacher's pipeline."""
    folder = distillation.student
    if not folder:
        return teacher.unet, False
    model = OmegaConf.to_container(teacher.config.model, resolve=True)
    options = {key: value for key, value in model.items() if key not in ("_target_", "name_or_path")}
    student = load_pipeline(folder, **options if folder == model["name_or_path"] else {})
    network, scheduler = network_of(student), student.scheduler
    if not is_continuous(scheduler):
        scheduler = on_the_grid(distillation, diffusers.DDIMScheduler, scheduler)  # as the teacher's is
    of_student, of_teacher = (
        {
            "prediction_type": prediction_type_of(scheduler),
            "noise schedule": noise_schedule_of(scheduler),
            **{key: unet.config.get(key) for key in SAME_IN_BOTH},
        }
        for scheduler, unet in ((scheduler, network), (teacher.pipeline.scheduler, teacher.unet))
    )
    if differing := [key for key in of_student if of_student[key] != of_teacher[key]]:
        both = {key: (of_student[key], of_teacher[key]) for key in differing if key != "noise schedule"}
        raise ValueError(
            f"distillation.student={folder} does not fit the teacher: it differs in {', '.join(differing)} {both or ''}"
        )
    set_resolution(student, native_pixels(teacher.pipeline), native_frames(teacher.pipeline))
    was_distilled = bool(trained_steps_of(student) or guidance_embed_dim(network))
    return network.requires_grad_(False).eval(), was_distilled


def noise_schedule_of(scheduler: Any) -> Any:
    """What teacher and student must have in common of it: α of every training timestep; EDM's σ_d; of a flow, which
    has the same at all times, nothing."""
    if is_edm(scheduler):
        return preconditioning_of(scheduler)
    return None if is_flow(scheduler) else schedule_of(scheduler).alpha_T.tolist()


def in_low_precision(unet: Prunable, dtype: str) -> Prunable:
    """A copy in which the linear layers of all blocks compute in the dtype; the embeddings and what lies between blocks
    stay as they are."""
    blocks = [block for block in unet.kept_blocks if block in unet.quantizable_blocks]
    return unet.with_architecture({b: replace(unet.architecture.get(b, WHOLE), dtype=dtype) for b in blocks})
