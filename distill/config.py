"""What distils: the step schedule and its stages."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import slimstep.eval.config
from slimstep.engine.checks import as_table, check_choice
from slimstep.engine.config import StageConfig
from slimstep.models.architecture import DTYPES

SAMPLERS = ("DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler")


@dataclass
class StageChanges:
    """What is different in one distillation stage: its teacher, with how many steps, and where it starts ("teacher",
    "student" or an earlier stage); values over `train` and over `objective`."""

    teacher: str | None = None
    teacher_steps: int | None = None
    start: str | None = None
    train: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, values: Any) -> "StageChanges":
        try:
            return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), as_table(name, values)))
        except OmegaConfBaseException as error:
            reason, keys = str(error).splitlines()[0], ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"distillation.stages.{name}={values}: {reason}; keys: {keys}") from error


@dataclass
class DistillationConfig:
    """The step schedule: samplers of fewer and fewer steps, from `steps[0]`, the teacher's, downwards.

    `student` is a diffusers folder whose UNet learns; empty is the teacher's own network. mode `direct` (SnapFusion):
    every stage's teacher is a network of the teacher's architecture with the steps of the stage before; `progressive`:
    the student of the stage before; for the teacher's own network they are the same. `stages` says what is different in
    single stages, by name: StageChanges. `recover` begins with the objective and training of `recovery`. With a
    `guidance_embed_dim` above 0 students are guidance-distilled: they have a guidance embedding of that width.
    `sampler` is the diffusers scheduler that students are exported with. `shift` is that of a flow's students (Esser et
    al. 2024, equation 23), where few steps want another than the teacher's many; null: the teacher's own. `quantize`:
    the dtype, int8 or fp8, in which the linear layers of the students' blocks compute, and are trained to
    (families/quantized.py); null: as those of the network that learns.
    """

    student: str = ""
    mode: str = "direct"
    steps: list[int] = field(default_factory=lambda: [32, 16, 8])
    stages: Any = None
    recover: bool = False
    timestep_spacing: str = "trailing"
    guidance_embed_dim: int = 0
    sampler: str = "DDIMScheduler"
    shift: float | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        check_choice("distillation", self, mode=("direct", "progressive"), sampler=SAMPLERS)
        if self.stages:  # None stays None: Hydra lets a table replace it, and nothing be added to an empty one
            table = as_table("distillation.stages", self.stages)
            self.stages = {name: StageChanges.of(name, changes) for name, changes in table.items()}
        pairs = list(itertools.pairwise(self.steps))
        if not pairs or any(below < 1 or above % below or above == below for above, below in pairs):
            rule = "must go down, each dividing the one before, as [32, 16, 8]"
            raise ValueError(f"distillation.steps={self.steps} {rule}")
        if self.recover and not self.student:
            raise ValueError("distillation.recover=true trains a pruned student, and distillation.student names none")
        if (width := self.guidance_embed_dim) and (width < 4 or width % 2):
            raise ValueError(f"distillation.guidance_embed_dim={width} must be even and at least 4, or 0")
        if self.quantize not in (None, *DTYPES):
            raise ValueError(f"distillation.quantize={self.quantize} must be null or one of {', '.join(DTYPES)}")
        if self.shift is not None and not 0 < self.shift < math.inf:
            raise ValueError(f"distillation.shift={self.shift} must be above 0, as 3.0")


@dataclass
class Config(slimstep.eval.config.Config):
    """The keys of the job that distils steps."""

    recovery: StageConfig = field(default_factory=StageConfig)
    v_prediction: StageConfig = field(default_factory=StageConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
