"""What the distilling job works with beside what every job does: the ladder's networks and their hand-over."""

import copy
import json
import logging
from functools import cached_property, partial
from pathlib import Path

import diffusers
import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from slimstep.data.folder import few
from slimstep.distill.config import LadderConfig, RungConfig
from slimstep.distill.ladder import Climb, climbed_otherwise, climbs
from slimstep.distill.pairs import FixedDraws, taught_pairs
from slimstep.distill.teaching import Rung
from slimstep.engine.config import StageConfig, TrainConfig
from slimstep.engine.files import damaged
from slimstep.engine.objective import Objective, requirements
from slimstep.eval.bench import Bench, clip_line
from slimstep.eval.overlap import among
from slimstep.models.denoiser import guidance_embed_dim
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.guidance import with_guidance_embedding
from slimstep.models.noise_schedule import NoiseSchedule, schedule_of
from slimstep.models.pipeline import export_pipeline, load_pipeline, one_line, with_unet
from slimstep.models.schedulers import check_noise_schedule, check_sampling, on_same_schedule, stated
from slimstep.models.sizes import set_resolution

log = logging.getLogger("slimstep")
SOLVERS_OWN = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "algorithm_type", "final_sigmas_type",
)  # fmt: skip
SAME_IN_BOTH = ("in_channels", "out_channels", "cross_attention_dim")


class DistillBench(Bench):
    """The networks of the ladder by name: "teacher", "student", then every rung that has been climbed.

    All but the teacher rest on the CPU: the device holds those that are at work. `teaching` is the one that a stage is
    given as its teacher.
    """

    teaching: PrunableUNet2DConditionModel | None = None

    @cached_property
    def ladder(self) -> LadderConfig:
        return OmegaConf.to_object(self.config.ladder)

    @property
    def rungs(self) -> dict[str, RungConfig]:
        """What is different in single rungs."""
        return self.ladder.rungs or {}

    @cached_property
    def climbs(self) -> tuple[Climb, ...]:
        rungs = climbs(self.ladder.steps, self.ladder.mode, own_network=not self.ladder.student)
        return climbed_otherwise(rungs, self.rungs)

    @cached_property
    def pipeline(self):
        """The teacher pipeline on the ladder's time grid: DDIM whose last step ends in clean latents."""
        pipeline = super().pipeline
        pipeline.scheduler = self.on_the_grid(diffusers.DDIMScheduler, pipeline.scheduler)
        return pipeline

    @property
    def predicts_velocity(self) -> bool:
        """Whether the teacher needs no fine-tuning to v first."""
        return self.pipeline.scheduler.config.prediction_type != "epsilon"

    @cached_property
    def scheduler(self) -> diffusers.DDIMScheduler:
        """What the ladder's networks are trained and taught with; ε-prediction has become v."""
        changes = {} if self.predicts_velocity else {"prediction_type": "v_prediction"}
        return self.on_the_grid(diffusers.DDIMScheduler, self.pipeline.scheduler, **changes)

    @cached_property
    def student_scheduler(self):
        """The diffusers scheduler that students are handed over with."""
        options = requirements(get_class(self.config.objective["_target_"])).sampler_options
        own = {option: self.config.objective[key] for option, key in options.items() if key in self.config.objective}
        return self.on_the_grid(getattr(diffusers, self.ladder.sampler), self.scheduler, **own)

    def on_the_grid(self, kind: type, scheduler, **changes):
        """A scheduler of this kind on the same noise schedule; x̂ is not clipped, for training does not clip it.

        Raises ValueError where there is no noise schedule, or this kind cannot keep it.
        """
        check_noise_schedule(scheduler)
        told = {key: value for key, value in stated(scheduler).items() if key not in SOLVERS_OWN}
        grid = {"timestep_spacing": self.ladder.timestep_spacing, "set_alpha_to_one": True}
        own = {**told, "clip_sample": False, "thresholding": False, **grid, **changes}
        return on_same_schedule(kind, scheduler, own)

    @cached_property
    def networks(self) -> dict[str, PrunableUNet2DConditionModel]:
        return {"teacher": self.teacher, "student": self.given_student()}

    def given_student(self) -> PrunableUNet2DConditionModel:
        """The network that learns, as it is given. ValueError where it does not fit the teacher's pipeline."""
        folder = self.ladder.student
        if not folder:
            return self.teacher
        model = OmegaConf.to_container(self.config.model, resolve=True)
        given = {key: value for key, value in model.items() if key not in ("_target_", "name_or_path")}
        student = load_pipeline(folder, **given if folder == model["name_or_path"] else {})
        own, other = (
            {
                "prediction_type": scheduler.config.prediction_type,
                "noise schedule": schedule_of(scheduler).alpha_T.tolist(),
                **{key: unet.config[key] for key in SAME_IN_BOTH},
            }
            for scheduler, unet in (
                (self.on_the_grid(diffusers.DDIMScheduler, student.scheduler), student.unet),  # as the teacher's is
                (self.pipeline.scheduler, self.teacher),
            )
        )
        if differing := [key for key in own if own[key] != other[key]]:
            told = {key: (own[key], other[key]) for key in differing if key != "noise schedule"}
            raise ValueError(
                f"ladder.student={folder} does not fit the teacher: it differs in {', '.join(differing)} {told or ''}"
            )
        set_resolution(student, self.teacher.config.sample_size * self.pipeline.vae_scale_factor)
        return student.unet.requires_grad_(False).eval()

    def check(self) -> None:
        """ValueError, before anything is trained, for a ladder that cannot be climbed or judged."""
        networks = self.networks
        self.check_agreement()
        self.check_inputs()
        if both := self.calibration_prompts:
            told = f"{len(both)} of {len(self.prompts[1].distinct)} prompts of the evaluation"
            log.warning(f"{told} are among those that the student's blocks were ranked on: {few(both)}")
        for key in ("velocity", "recovery"):
            self.check_objective(f"{key}.objective", self.config[key].objective, self.config[key].train)
        for climb in self.climbs:
            given = {"schedule": self.schedule, "rung": self.rung(climb)}
            self.check_objective("objective", self.objective_of(climb), self.training(climb.name), **given)
        for steps in self.config.curves.steps:
            try:
                check_sampling(self.student_scheduler, steps)
            except ValueError as error:
                raise ValueError(f"curves.steps={list(self.config.curves.steps)}: {one_line(error)}") from error
        if self.ladder.guidance_width:
            with_guidance_embedding(networks["student"], self.ladder.guidance_width)

    def check_agreement(self) -> None:
        """ValueError where the objective does not make the students that the ladder asks for."""
        kind = get_class(self.config.objective["_target_"])
        requires = requirements(kind)
        if not requires.distils_steps:
            raise ValueError(f"objective {kind.__name__} distils no steps; choose objective=steps, guidance or lcm")
        if requires.sampler == "LCMScheduler" and len(self.climbs) > 1:
            raise ValueError(f"objective {kind.__name__} has one rung, as ladder.steps=[32,4]: its student serves all")
        silent_trainings = {
            f"objective {kind.__name__}": not requires.guidance_embedding,
            "learning to predict v": not self.predicts_velocity,
            "ladder.repair": self.ladder.repair,
        }
        silent = [name for name, is_asked in silent_trainings.items() if is_asked]
        told = [name for name, unet in self.networks.items() if guidance_embed_dim(unet)]
        if silent and told:
            who, what = " and ".join(told), " and ".join(silent)
            raise ValueError(f"its guidance scale is told to the {who}, and {what} would not tell it")
        if requires.guidance_embedding != bool(self.ladder.guidance_width):
            way = f"needs ladder.guidance_width{', as 256' if requires.guidance_embedding else '=0'}"
            raise ValueError(f"objective {kind.__name__} {way}")
        if (requires.sampler or self.ladder.sampler) != self.ladder.sampler or (
            self.ladder.sampler == "LCMScheduler" and requires.sampler is None
        ):
            raise ValueError(f"objective {kind.__name__} and ladder.sampler={self.ladder.sampler} do not go together")

    @cached_property
    def calibration_prompts(self) -> list[str] | None:
        """The prompts of the evaluation that the student's blocks were ranked on, as the run that pruned it tells.

        None where the student is no export of prune_unet's.
        """
        file = Path(self.ladder.student or "").parent / "prompts.json"
        if not self.ladder.student or not file.is_file():
            return None
        with damaged(file):
            return among(self.prompts[1], json.loads(file.read_text())["ranked_on"])

    @property
    def seen_prompts(self) -> dict[str, int]:
        both = self.calibration_prompts
        return super().seen_prompts | ({} if both is None else {"prompts_in_calibration": len(both)})

    def training(self, name: str) -> TrainConfig:
        """`train` with what `ladder.rungs` says of this rung. ValueError for unknown keys and wrong types."""
        own = self.rungs.get(name, RungConfig()).train
        train = OmegaConf.to_container(self.config.train)
        try:
            return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), train, own))
        except OmegaConfBaseException as error:
            told = f"ladder.rungs.{name}.train={own}: {one_line(error)}; train has {sorted(train)}"
            raise ValueError(told) from error

    def objective_of(self, climb: Climb) -> DictConfig:
        """`objective` with what `ladder.rungs` says of this rung."""
        return OmegaConf.merge(self.config.objective, self.rungs.get(climb.name, RungConfig()).objective)

    def rung(self, climb: Climb) -> Rung:
        return Rung(self.scheduler, climb.teacher_steps, self.student_scheduler, climb.steps)

    @property
    def schedule(self) -> NoiseSchedule:
        """The ladder's noise schedule."""
        return schedule_of(self.scheduler, self.device)

    def learn_velocity(self) -> None:
        """Where the teacher predicts ε, it and the student learn to predict v first; x̂ from ε is lost in noise."""
        if self.predicts_velocity:
            return
        velocity: StageConfig = self.config.velocity
        learnt: dict[int, PrunableUNet2DConditionModel] = {}  # the student may be the teacher
        for name, unet in self.networks.items():
            if id(unet) not in learnt:
                learnt[id(unet)] = self.taught(unet, velocity.objective, velocity.train, f"velocity-{name}")
        self.networks |= {name: learnt[id(unet)] for name, unet in self.networks.items()}

    def repair(self) -> None:
        """The student learns the teacher's output and features again, where the configuration asks for it."""
        if self.ladder.repair:
            recovery, student = self.config.recovery, self.networks["student"]
            teacher = self.at_work("teacher")
            self.networks["student"] = self.taught(
                student, recovery.objective, recovery.train, "repair", teacher=teacher
            )

    def climb(self, climb: Climb) -> None:
        """Trains and exports one rung; where it exists it is loaded."""
        unet, width = self.networks[climb.start], self.ladder.guidance_width
        unet = with_guidance_embedding(unet, width) if width else unet
        log.info(f"{climb.name}: from {climb.start}, taught by {climb.teacher} with {climb.teacher_steps} steps")
        training = self.training(climb.name)
        given = {"teacher": self.at_work(climb.teacher, training.compile), "rung": self.rung(climb)}
        unet = self.taught(unet, self.objective_of(climb), training, climb.name, **given)
        self.networks[climb.name] = unet
        self.run.sealed_folder(f"{climb.name}/export", partial(self.write_export, unet, climb.steps))

    @property
    def idle(self) -> list[nn.Module]:
        """The teacher, too, where a copy of it or another network teaches."""
        rests = self.teaching is not None and self.teaching is not self.teacher
        return [*super().idle, self.teacher] if rests else super().idle

    def taught(self, unet, objective, config: TrainConfig, stage: str, **given) -> PrunableUNet2DConditionModel:
        """A copy of the network in float32, trained with an objective of the loop, on the ladder's noise schedule."""
        self.teaching = given.get("teacher")
        if self.teaching is not None:
            vars(self).pop("working_teacher", None)  # of an earlier stage
        copied = copy.deepcopy(unet).to(self.device, torch.float32).requires_grad_()
        try:
            trained = self.train(copied, objective, config, stage, schedule=self.schedule, **given)
        finally:
            self.teaching = None
        return trained.requires_grad_(False).to("cpu")

    def samples(self, objective: Objective, stage: str):
        """The pairs; with the teacher's answers, where the objective asks for them beforehand."""
        if (cached := requirements(objective).cached_targets) is None:
            return self.pairs
        draws = FixedDraws(self.pairs, cached, self.pairs.unconditional, self.run.seed)
        batch_size, keep = self.config.eval.batch_size, self.partial(f"{stage}-answers")
        return taught_pairs(draws, cached.compute, self.run, stage, batch_size, keep)

    def at_work(self, name: str, compiled: bool = False) -> PrunableUNet2DConditionModel:
        """A network that teaches."""
        if not compiled:
            return self.working(self.networks[name])
        unet = copy.deepcopy(self.networks[name]).to(self.device, self.compute_dtype)
        unet.compile(dynamic=False)
        return unet

    def write_export(self, unet: PrunableUNet2DConditionModel, steps: int, folder: Path) -> None:
        student = with_unet(self.pipeline, unet, scheduler=self.student_scheduler)
        origin = self.origin(self.config.eval, steps)
        log.info(f"exported: {export_pipeline(student, folder, origin=origin).load}")

    def write_cards(self, evaluation: dict) -> None:
        """Every student's scores at its own number of steps, into its model card."""
        guidance = self.config.eval.guidance_scale
        for point in evaluation["points"]:
            name, steps = point["model"], point["steps"]
            if name == f"steps-{steps}" and point["guidance"] == guidance:
                scores = clip_line(point["clip"], point["versus_teacher"])
                self.card(f"{name}/export", [f"{scores} (the teacher at {self.ladder.steps[0]} steps)"])
