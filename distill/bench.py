"""What the distilling job works with beside what every job does: the ladder's networks and their hand-over."""

import copy
import logging
from functools import cached_property, partial

import diffusers
from omegaconf import OmegaConf

from distill.ladder import Climb, climbs
from distill.teaching import Rung
from engine.config import LadderConfig, StageConfig, TrainConfig
from eval.bench import Bench
from models.guidance import told_guidance_width, with_told_guidance
from models.pipeline import export_pipeline, load_pipeline, with_unet
from models.schedule import nested_steps
from models.unet import PrunableUNet2DConditionModel

log = logging.getLogger("slimstep")
SAME_IN_BOTH = ("in_channels", "out_channels", "cross_attention_dim")


class DistillBench(Bench):
    """The networks of the ladder by name: "teacher", "student", then every rung that has been climbed."""

    @cached_property
    def ladder(self) -> LadderConfig:
        return OmegaConf.to_object(self.config.ladder)

    @cached_property
    def climbs(self) -> tuple[Climb, ...]:
        return climbs(self.ladder.steps, self.ladder.mode, own_network=not self.ladder.student)

    @cached_property
    def pipeline(self):
        """The teacher pipeline on the ladder's time grid: DDIM, the last step ending in clean latents."""
        pipeline = super().pipeline
        pipeline.scheduler = self.ddim(pipeline.scheduler)
        return pipeline

    def ddim(self, scheduler, **changes) -> diffusers.DDIMScheduler:
        grid = {"timestep_spacing": self.ladder.timestep_spacing, "set_alpha_to_one": True}
        return diffusers.DDIMScheduler.from_config({**scheduler.config, **grid, **changes})

    @cached_property
    def teacher_scheduler(self) -> diffusers.DDIMScheduler:
        """What the teacher, as it was given, is sampled with."""
        return self.pipeline.scheduler

    @cached_property
    def networks(self) -> dict[str, PrunableUNet2DConditionModel]:
        return {"teacher": self.teacher, "student": self.given_student()}

    def given_student(self) -> PrunableUNet2DConditionModel:
        """The network that learns, as it is given. ValueError where it does not fit the teacher's pipeline."""
        folder = self.ladder.student
        if not folder:
            return self.teacher
        student = load_pipeline(folder)
        own, other = (
            {"prediction_type": scheduler.config.prediction_type, **{key: unet.config[key] for key in SAME_IN_BOTH}}
            for scheduler, unet in ((student.scheduler, student.unet), (self.pipeline.scheduler, self.teacher))
        )
        if differing := {key: (own[key], other[key]) for key in own if own[key] != other[key]}:
            raise ValueError(f"ladder.student={folder} does not fit the teacher; (student, teacher): {differing}")
        return student.unet.requires_grad_(False).eval().to(self.device)

    def check(self) -> None:
        """ValueError, before anything is trained, for a ladder that cannot be climbed."""
        for climb in self.climbs:
            nested_steps(self.pipeline.scheduler, climb.steps, climb.teacher_steps)
        names = [climb.name for climb in self.climbs]
        if unknown := sorted(set(self.ladder.rungs or {}) - set(names)):
            raise ValueError(f"ladder.rungs names {unknown}; this ladder has {names}")
        for name in names:
            self.training(name)
        _ = self.networks
        self.student_scheduler()

    def training(self, name: str) -> TrainConfig:
        """`train` with what `ladder.rungs` says of this rung. ValueError for unknown keys."""
        train = OmegaConf.to_container(self.config.train)
        own = dict((self.ladder.rungs or {}).get(name, {}))
        if unknown := sorted(set(own) - set(train)):
            raise ValueError(f"ladder.rungs.{name} has unknown keys {unknown}; train has {sorted(train)}")
        return TrainConfig(**{**train, **own})

    def learn_velocity(self) -> None:
        """Where the teacher predicts ε, it and the student learn to predict v first; x̂ from ε is lost in noise."""
        if self.teacher_scheduler.config.prediction_type != "epsilon":
            return
        self.pipeline.scheduler = self.ddim(self.pipeline.scheduler, prediction_type="v_prediction")
        velocity: StageConfig = self.config.velocity
        learnt: dict[int, PrunableUNet2DConditionModel] = {}  # the student may be the teacher
        for name, unet in self.networks.items():
            if id(unet) not in learnt:
                copied = copy.deepcopy(unet).requires_grad_()
                trained = self.train(copied, velocity.objective, velocity.train, f"velocity-{name}")
                learnt[id(unet)] = trained.requires_grad_(False)
        self.networks |= {name: learnt[id(unet)] for name, unet in self.networks.items()}

    def repair(self) -> None:
        """The student learns the teacher's output and features again, where the configuration asks for it."""
        if self.ladder.repair and self.ladder.student:
            recovery: StageConfig = self.config.recovery
            student = copy.deepcopy(self.networks["student"]).requires_grad_()
            teacher = {"teacher": self.networks["teacher"]}
            repaired = self.train(student, recovery.objective, recovery.train, "repair", **teacher)
            self.networks["student"] = repaired.requires_grad_(False)

    def climb(self, climb: Climb) -> None:
        """Trains and exports one rung; where it exists it is loaded."""
        unet = copy.deepcopy(self.networks[climb.start])
        if self.ladder.guidance_width and not told_guidance_width(unet):
            unet = with_told_guidance(unet, self.ladder.guidance_width)
        rung = Rung(self.pipeline.scheduler, climb.teacher_steps, climb.steps)
        given = {"teacher": self.networks[climb.teacher], "rung": rung}
        log.info(f"{climb.name}: from {climb.start}, taught by {climb.teacher} with {climb.teacher_steps} steps")
        unet = self.train(unet.requires_grad_(), self.config.objective, self.training(climb.name), climb.name, **given)
        self.networks[climb.name] = unet.requires_grad_(False)
        self.run.sealed_folder(f"{climb.name}/export", partial(self.write_export, unet))

    def write_export(self, unet: PrunableUNet2DConditionModel, folder) -> None:
        student = with_unet(self.pipeline, unet, scheduler=self.student_scheduler())
        log.info(f"exported: {export_pipeline(student, folder).load}")

    def student_scheduler(self):
        """The diffusers scheduler that students are sampled with, on the ladder's grid."""
        kind = getattr(diffusers, self.ladder.sampler, None)
        if kind is None or not hasattr(kind, "set_timesteps"):
            raise ValueError(f"ladder.sampler={self.ladder.sampler} is no scheduler of diffusers; try DDIMScheduler")
        return kind.from_config(self.pipeline.scheduler.config)
