"""What distils: the ladder of sampling steps."""

import itertools
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import slimstep.eval.config
from slimstep.engine.checks import as_table
from slimstep.engine.config import StageConfig

SAMPLERS = ("DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler")


@dataclass
class RungConfig:
    """What is different in one rung: who teaches it, with how many steps, and where it starts ("teacher", "student" or
    an earlier rung); values over `train` and over `objective`."""

    teacher: str | None = None
    teacher_steps: int | None = None
    start: str | None = None
    train: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, values: Any) -> "RungConfig":
        try:
            return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), as_table(name, values)))
        except OmegaConfBaseException as error:
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"ladder.rungs.{name}={values}: {str(error).splitlines()[0]}; keys: {known}") from error


@dataclass
class LadderConfig:
    """Which samplers are distilled into which, from `steps[0]`, the teacher's, downwards.

    `student` is a diffusers folder whose UNet learns; empty is the teacher's own network. mode `direct` (SnapFusion):
    every rung is taught by a network of the teacher's architecture with the rung above's steps; `progressive`: by the
    student's own rung above; for the teacher's own network they are the same. `rungs` says what is different in single
    rungs, by name: RungConfig. `repair` begins with the objective and training of `recovery`. `guidance_width` above 0
    makes students that are told their guidance scale. `sampler` is the diffusers scheduler that students are handed
    over with.
    """

    student: str = ""
    mode: str = "direct"
    steps: list[int] = field(default_factory=lambda: [32, 16, 8])
    rungs: Any = None
    repair: bool = False
    timestep_spacing: str = "trailing"
    guidance_width: int = 0
    sampler: str = "DDIMScheduler"

    def __post_init__(self) -> None:
        if self.mode not in ("direct", "progressive"):
            raise ValueError(f"ladder.mode={self.mode!r} is unknown; choose direct or progressive")
        if self.rungs:  # None stays None: Hydra lets a table replace it, and nothing be added to an empty one
            self.rungs = {name: RungConfig.of(name, own) for name, own in as_table("ladder.rungs", self.rungs).items()}
        pairs = list(itertools.pairwise(self.steps))
        if not pairs or any(below < 1 or above % below or above == below for above, below in pairs):
            raise ValueError(f"ladder.steps={self.steps} must go down, each dividing the one before, as [32, 16, 8]")
        if self.repair and not self.student:
            raise ValueError("ladder.repair=true repairs a pruned student, and ladder.student names none")
        if self.guidance_width and (self.guidance_width < 4 or self.guidance_width % 2):
            raise ValueError(f"ladder.guidance_width={self.guidance_width} must be even and at least 4, or 0")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"ladder.sampler={self.sampler!r} is unknown; choose from {SAMPLERS}")


@dataclass
class Config(slimstep.eval.config.Config):
    """The keys of the job that distils steps."""

    recovery: StageConfig = field(default_factory=StageConfig)
    velocity: StageConfig = field(default_factory=StageConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
