"""What all stages of a step distillation share: the teacher on the time grid, the student, schedulers, the stages."""

from dataclasses import dataclass
from typing import Any

import diffusers
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slimstep.distill.config import LadderConfig, RungConfig
from slimstep.distill.ladder import Climb, climbed_otherwise, climbs
from slimstep.distill.teaching import Rung
from slimstep.engine.config import TrainConfig
from slimstep.engine.objective import requirements
from slimstep.eval.inputs import Teacher, check_inputs
from slimstep.eval.training import check_objective
from slimstep.models.denoiser import guidance_embed_dim
from slimstep.models.families.prunable import PrunableUNet
from slimstep.models.guidance import with_guidance_embedding
from slimstep.models.noise_schedule import NoiseSchedule, schedule_of
from slimstep.models.pipeline import load_pipeline, one_line
from slimstep.models.schedulers import check_noise_schedule, check_sampling, on_same_schedule, stated
from slimstep.models.sizes import native_pixels, set_resolution

SOLVERS_OWN = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "algorithm_type", "final_sigmas_type",
)  # fmt: skip
SAME_IN_BOTH = ("in_channels", "out_channels", "cross_attention_dim")


@dataclass(frozen=True)
class Distillation:
    """The teacher samples by DDIM whose last step ends in clean latents; `student` is the network that learns, as it is
    given."""

    teacher: Teacher
    ladder: LadderConfig
    climbs: tuple[Climb, ...]
    student: PrunableUNet

    @property
    def predicts_v(self) -> bool:
        """Whether the teacher needs no conversion to v-prediction first."""
        return self.teacher.pipeline.scheduler.config.prediction_type != "epsilon"

    @property
    def scheduler(self) -> diffusers.DDIMScheduler:
        """What networks are trained and taught with; ε-prediction has become v."""
        changes = {} if self.predicts_v else {"prediction_type": "v_prediction"}
        return self.on_the_grid(diffusers.DDIMScheduler, self.teacher.pipeline.scheduler, **changes)

    @property
    def schedule(self) -> NoiseSchedule:
        return schedule_of(self.scheduler, self.teacher.device)

    @property
    def student_scheduler(self) -> Any:
        """The diffusers scheduler that students are exported with."""
        objective = self.teacher.config.objective
        options = requirements(get_class(objective["_target_"])).sampler_options
        own = {option: objective[key] for option, key in options.items() if key in objective}
        return self.on_the_grid(getattr(diffusers, self.ladder.sampler), self.scheduler, **own)

    def on_the_grid(self, kind: type, scheduler: Any, **changes: Any) -> Any:
        return on_the_grid(self.ladder, kind, scheduler, **changes)

    def changes(self, name: str) -> RungConfig:
        """What is different in one stage."""
        return (self.ladder.rungs or {}).get(name, RungConfig())

    def training(self, name: str) -> TrainConfig:
        """`train` with what `ladder.rungs` says of this stage. ValueError for unknown keys and wrong types."""
        own, train = self.changes(name).train, OmegaConf.to_container(self.teacher.config.train)
        try:
            return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), train, own))
        except OmegaConfBaseException as error:
            said = f"ladder.rungs.{name}.train={own}: {one_line(error)}; train has {sorted(train)}"
            raise ValueError(said) from error

    def objective(self, climb: Climb) -> DictConfig:
        """`objective` with what `ladder.rungs` says of this stage."""
        return OmegaConf.merge(self.teacher.config.objective, self.changes(climb.name).objective)

    def rung(self, climb: Climb) -> Rung:
        return Rung(self.scheduler, climb.teacher_steps, self.student_scheduler, climb.steps)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """The models that are evaluated, in order: the teacher's samplers, the teacher converted to v, the students."""
        teachers = ("teacher", "teacher-dpm") if self.predicts_v else ("teacher", "teacher-dpm", "teacher-v")
        return *teachers, *(climb.name for climb in self.climbs if climb.name.startswith("steps-"))

    def evaluated_steps(self, name: str) -> list[int]:
        """At which a model is evaluated, most first; the teacher at the reference's, too."""
        more = {self.ladder.steps[0]} if name == "teacher" else set()
        return sorted({*self.teacher.config.curves.steps, *more}, reverse=True)


def distillation_of(teacher: Teacher) -> Distillation:
    """Raises ValueError for stages that cannot be, and for a student that does not fit the teacher's pipeline."""
    ladder: LadderConfig = OmegaConf.to_object(teacher.config.ladder)
    stages = climbs(ladder.steps, ladder.mode, own_network=not ladder.student)
    stages = climbed_otherwise(stages, ladder.rungs or {})
    pipeline = teacher.pipeline
    pipeline.scheduler = on_the_grid(ladder, diffusers.DDIMScheduler, pipeline.scheduler)
    return Distillation(teacher, ladder, stages, given_student(teacher, ladder))


def on_the_grid(ladder: LadderConfig, kind: type, scheduler: Any, **changes: Any) -> Any:
    """A scheduler of this kind on the same noise schedule; x̂ is not clipped, for training does not clip it.

    Raises ValueError where there is no noise schedule, or this kind cannot keep it.
    """
    check_noise_schedule(scheduler)
    kept = {key: value for key, value in stated(scheduler).items() if key not in SOLVERS_OWN}
    grid = {"timestep_spacing": ladder.timestep_spacing, "set_alpha_to_one": True}
    return on_same_schedule(kind, scheduler, {**kept, "clip_sample": False, "thresholding": False, **grid, **changes})


def given_student(teacher: Teacher, ladder: LadderConfig) -> PrunableUNet:
    """The network that learns, as it is given. ValueError where it does not fit the teacher's pipeline."""
    folder = ladder.student
    if not folder:
        return teacher.unet
    model = OmegaConf.to_container(teacher.config.model, resolve=True)
    options = {key: value for key, value in model.items() if key not in ("_target_", "name_or_path")}
    student = load_pipeline(folder, **options if folder == model["name_or_path"] else {})
    own, other = (
        {
            "prediction_type": scheduler.config.prediction_type,
            "noise schedule": schedule_of(scheduler).alpha_T.tolist(),
            **{key: unet.config.get(key) for key in SAME_IN_BOTH},
        }
        for scheduler, unet in (
            (on_the_grid(ladder, diffusers.DDIMScheduler, student.scheduler), student.unet),  # as the teacher's is
            (teacher.pipeline.scheduler, teacher.unet),
        )
    )
    if differing := [key for key in own if own[key] != other[key]]:
        both = {key: (own[key], other[key]) for key in differing if key != "noise schedule"}
        raise ValueError(
            f"ladder.student={folder} does not fit the teacher: it differs in {', '.join(differing)} {both or ''}"
        )
    set_resolution(student, native_pixels(teacher.pipeline))
    return student.unet.requires_grad_(False).eval()


def check(job: Distillation) -> None:
    """ValueError, before anything is trained, for stages that cannot be trained or evaluated."""
    config, teacher = job.teacher.config, job.teacher
    check_agreement(job)
    check_inputs(teacher)
    for key in ("velocity", "recovery"):
        check_objective(f"{key}.objective", config[key].objective, config[key].train, teacher)
    for climb in job.climbs:
        given = {"schedule": job.schedule, "rung": job.rung(climb)}
        check_objective("objective", job.objective(climb), job.training(climb.name), teacher, **given)
    for steps in config.curves.steps:
        try:
            check_sampling(job.student_scheduler, steps)
        except ValueError as error:
            raise ValueError(f"curves.steps={list(config.curves.steps)}: {one_line(error)}") from error
    if job.ladder.guidance_width:
        with_guidance_embedding(job.student, job.ladder.guidance_width)


def check_agreement(job: Distillation) -> None:
    """ValueError where the objective does not make the students that the ladder asks for."""
    kind, ladder = get_class(job.teacher.config.objective["_target_"]), job.ladder
    requires = requirements(kind)
    if not requires.distils_steps:
        raise ValueError(f"objective {kind.__name__} distils no steps; choose objective=steps, guidance or lcm")
    if requires.sampler == "LCMScheduler" and len(job.climbs) > 1:
        raise ValueError(f"objective {kind.__name__} has one rung, as ladder.steps=[32,4]: its student serves all")
    silent_trainings = {
        f"objective {kind.__name__}": not requires.guidance_embedding,
        "learning to predict v": not job.predicts_v,
        "ladder.repair": ladder.repair,
    }
    silent = [name for name, is_asked in silent_trainings.items() if is_asked]
    unets = {"teacher": job.teacher.unet, "student": job.student}
    embedded = [name for name, unet in unets.items() if guidance_embed_dim(unet)]
    if silent and embedded:
        who, what = " and ".join(embedded), " and ".join(silent)
        raise ValueError(f"its guidance scale is told to the {who}, and {what} would not tell it")
    if requires.guidance_embedding != bool(ladder.guidance_width):
        way = f"needs ladder.guidance_width{', as 256' if requires.guidance_embedding else '=0'}"
        raise ValueError(f"objective {kind.__name__} {way}")
    if (requires.sampler or ladder.sampler) != ladder.sampler or (
        ladder.sampler == "LCMScheduler" and requires.sampler is None
    ):
        raise ValueError(f"objective {kind.__name__} and ladder.sampler={ladder.sampler} do not go together")
