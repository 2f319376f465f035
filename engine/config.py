"""The knobs every job shares, typed: a misspelt one is an error before anything runs."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

SCHEDULES = ("cosine", "constant")
MOST_ROUNDS = 200
SAMPLERS = ("DDIMScheduler", "EulerDiscreteScheduler", "LCMScheduler")


@dataclass
class TrainConfig:
    """One call of the training loop.

    `batch_size` is per process and micro-step; `compile` is torch.compile; `channels_last` is the memory format of
    convolutions that GPUs, and some CPUs, are faster with.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    weight_decay: float = 0.01
    warmup_steps: int = 50
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    workers: int = 0
    gradient_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"train.schedule={self.schedule!r} is unknown; choose from {SCHEDULES}")
        names = ("steps", "batch_size", "accumulation", "checkpoint_every", "keep_checkpoints", "log_every")
        at_least("train", self, 1, *names)
        if len(self.betas) != 2:
            raise ValueError(f"train: betas={self.betas} must be two numbers")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train: {name}={getattr(self, name)} must be above 0")
        at_least("train", self, 0, "weight_decay", "warmup_steps", "workers", "ema_decay")
        if not all(0 <= share < 1 for share in (self.ema_decay, *self.betas)):
            raise ValueError(f"train: ema_decay={self.ema_decay} and betas={self.betas} must lie in [0, 1)")


@dataclass
class StageConfig:
    """A training stage with an objective of its own."""

    objective: Any = None
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class CacheConfig:
    """Where encoded images and texts lie; `batch_size` counts images."""

    folder: str = "runs/cache"
    batch_size: int = 64

    def __post_init__(self) -> None:
        at_least("data.cache", self, 1, "batch_size")


@dataclass
class DataConfig:
    """What every `data` group has; its other keys belong to the constructors of its pairs and prompts."""

    resolution: int | None = None
    prompt_file: str | None = None
    pairs: Any = None
    prompts: Any = None
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if self.resolution is not None:
            at_least("data", self, 1, "resolution")


@dataclass
class SearchConfig:
    """How an architecture is chosen. `target_ms` wins over `target_fraction`, a share of the teacher's UNet latency."""

    method: Any = None
    target_fraction: float | None = 0.75
    target_ms: float | None = None
    rounds: int = 2
    bypass: Any = "shortcut"
    copy_init: str = "zero"

    def __post_init__(self) -> None:
        at_least("search", self, 1, "rounds")
        if self.rounds > MOST_ROUNDS:
            raise ValueError(f"search.rounds={self.rounds} is more than {MOST_ROUNDS}: no UNet has so many blocks")
        if not isinstance(self.bypass, (str, dict)) and not OmegaConf.is_dict(self.bypass):
            raise ValueError(f"search.bypass={self.bypass} must be shortcut, drop_skip or a table {{site: rule}}")
        if self.copy_init not in ("zero", "same"):
            raise ValueError(f"search.copy_init={self.copy_init!r} is unknown; choose zero or same")
        for name in ("target_fraction", "target_ms"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"search.{name}={value} must be above 0")


@dataclass
class LatencyConfig:
    """How the UNet is timed; `warmup`, `iterations` and `seconds` serve whole pipelines as well.

    `batch` counts UNet rows: 2 is one guided image. `latent_size` and `text_length` 0 are the model's own. A median
    takes `iterations` calls, fewer (but three) where they would last longer than `seconds`. `table`, a latency.json
    made elsewhere, takes the place of all measuring.
    """

    table: str = ""
    batch: int = 2
    latent_size: int = 0
    text_length: int = 0
    compile: bool = False
    dtype: str = "float32"
    warmup: int = 5
    iterations: int = 40
    seconds: float = 30.0
    additive_samples: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("latency", self, 1, "batch", "warmup", "iterations", "additive_samples")
        at_least("latency", self, 0, "latent_size", "text_length", "seconds")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"latency.dtype={self.dtype!r} is unknown; choose float32, float16 or bfloat16")


@dataclass
class SamplingConfig:
    """Images that are scored: how many prompts, and how they are drawn. `batch_size` counts images."""

    prompts: int = 64
    steps: int = 8
    guidance_scale: float = 2.5
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        at_least(type(self).__name__.removesuffix("Config").lower(), self, 2, "prompts")
        at_least(type(self).__name__.removesuffix("Config").lower(), self, 1, "steps", "batch_size")
        at_least(type(self).__name__.removesuffix("Config").lower(), self, 0, "guidance_scale")


@dataclass
class ScoringConfig(SamplingConfig):
    """The sampling that ranks blocks. Protocol `snapfusion`: every removal, on the same fixed number of prompts."""

    protocol: str = "snapfusion"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol != "snapfusion":
            raise ValueError(f"scoring.protocol={self.protocol!r} is unknown; choose snapfusion")


@dataclass
class EvalConfig(SamplingConfig):
    """The sampling that judges the outcome; the first `pictures` images are kept: all of them where there are no more,
    and none for 0, which only the evaluation of pipelines takes."""

    pictures: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("eval", self, 0, "pictures")


@dataclass
class DecoderConfig:
    """A narrow VAE decoder.

    `width` is the share of channels that stays: a number, or one per level in the order of the VAE's
    `block_out_channels`. They are chosen by `choice`: magnitude, taylor, energy, random or first, where taylor and
    energy look at `samples` latents. `norm_groups`: groups of its norms stay or go as wholes ('whole'), or all of them
    are thinned alike ('thinned'). It is timed on `latent_sizes` (null: the model's own and twice that) and `batches`.
    """

    width: Any = 0.5
    choice: str = "magnitude"
    norm_groups: str = "whole"
    samples: int = 32
    latent_sizes: list[int] | None = None
    batches: list[int] = field(default_factory=lambda: [1, 4])

    def __post_init__(self) -> None:
        at_least("decoder", self, 1, "samples")
        shares = self.width if OmegaConf.is_list(self.width) or isinstance(self.width, list) else [self.width]
        if not shares or not all(isinstance(share, (int, float)) and 0 < share <= 1 for share in shares):
            raise ValueError(f"decoder.width={self.width} must be a share above 0 and at most 1, or a list of them")
        for name in ("latent_sizes", "batches"):
            if (values := getattr(self, name)) is not None and not (values and all(value >= 1 for value in values)):
                raise ValueError(f"decoder.{name}={values} must be a list of numbers from 1 up")


@dataclass
class LatentsConfig(SamplingConfig):
    """What a decoder is trained on: `count` latents, sampled from `prompts` captions of the training images (or of
    `prompt_file`), each from several noises. Of `rounds` trainings, each of `train.steps` with its own
    optimiser and schedule, round r sees r/rounds of them; a share `real_share` is encoded images instead."""

    prompts: int = 1024
    count: int = 4096
    prompt_file: str | None = None
    real_share: float = 0.0
    rounds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("latents", self, 1, "count", "rounds")
        if not 0 <= self.real_share <= 1:
            raise ValueError(f"latents.real_share={self.real_share} must lie between 0 and 1")
        if self.rounds > self.count:
            raise ValueError(f"latents.rounds={self.rounds} is more than latents.count={self.count}")


@dataclass
class EvaluationConfig:
    """What is measured beside CLIP score: with `distribution` the distance of the scorer's features to those of
    `real_images` held-out images; and of Inception features, FID and KID, where `inception` is a file of its weights;
    and `preferences`, {name: what makes it}, which +preference=NAME fills in. With `compile`, UNet and VAE decoder are
    compiled graphs, kept in `artifacts` for the next evaluation and the other processes.
    """

    distribution: bool = True
    real_images: int = 512
    inception: str | None = None
    preferences: Any = None
    compile: bool = False
    artifacts: str = "runs/artifacts"

    def __post_init__(self) -> None:
        at_least("evaluation", self, 2, "real_images")
        if self.inception is not None and not self.distribution:
            raise ValueError(f"evaluation.inception={self.inception} needs evaluation.distribution=true")
        if not isinstance(self.preferences, (dict, type(None))) and not OmegaConf.is_dict(self.preferences):
            raise ValueError(f"evaluation.preferences={self.preferences} must be a table, as +preference=NAME gives it")


@dataclass
class BenchmarkConfig:
    """How pipelines run that are timed.

    benchmark: every combination of `compile`, `attention`, `dtype`, `memory_format`, `fused_qkv`, `quantize` and
    `batches`, each beside a pipeline in `base`, the setup that ratios are to (null: diffusers as it comes). ladder:
    `rows`, each a name and what changes from the last row that was kept. pipelines: `tasks`, eager and as `compile`
    says. `images` are compared with those of float32. `first_image` measures what compiling costs, in new processes.
    """

    compile: list[str] = field(default_factory=lambda: ["eager"])
    attention: list[str] = field(default_factory=lambda: ["sdpa"])
    dtype: list[str] = field(default_factory=lambda: ["float32"])
    memory_format: list[str] = field(default_factory=lambda: ["contiguous"])
    fused_qkv: list[bool] = field(default_factory=lambda: [False])
    quantize: list[str] = field(default_factory=lambda: ["none"])
    batches: list[int] = field(default_factory=lambda: [1])
    base: Any = None
    rows: list[Any] = field(default_factory=list)
    tasks: list[str] = field(default_factory=lambda: ["txt2img"])
    images: int = 8
    first_image: bool = False

    def __post_init__(self) -> None:
        at_least("benchmark", self, 2, "images")
        as_table("benchmark.base", self.base)  # None stays: Hydra adds nothing to an empty table
        for name in ("compile", "attention", "dtype", "memory_format", "fused_qkv", "quantize", "batches", "tasks"):
            if not getattr(self, name):
                raise ValueError(f"benchmark.{name}=[] leaves nothing to time")
        if not all(batch >= 1 for batch in self.batches):
            raise ValueError(f"benchmark.batches={list(self.batches)} must be numbers from 1 up")


def at_least(section: str, config: Any, least: int, *names: str) -> None:
    for name in names:
        if not least <= getattr(config, name) < math.inf:
            raise ValueError(f"{section}: {name}={getattr(config, name)} must be at least {least}")


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


def as_table(name: str, value: Any) -> dict:
    if not isinstance(value or {}, dict):
        raise ValueError(f"{name}={value} must be a table, as {{steps-8: {{teacher: teacher, teacher_steps: 32}}}}")
    return value or {}


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
class CurvesConfig:
    """Numbers of steps and guidance scales at which the teacher and every student are judged."""

    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    guidance: list[float] = field(default_factory=lambda: [1.0, 2.5, 7.5])

    def __post_init__(self) -> None:
        for name in ("steps", "guidance"):
            values = getattr(self, name)
            if not values or not all(1 <= value < math.inf for value in values):
                raise ValueError(f"curves.{name}={values} must be a list of numbers from 1 up")


@dataclass
class TrackerConfig:
    """Where metrics, images and tables go beside metrics.jsonl."""

    log_with: str | None = None
    project: str = "slimstep"
    mode: str = "offline"


@dataclass
class RunConfig:
    """`overwrite` moves a run directory aside that another configuration has made."""

    overwrite: bool = False


@dataclass
class Config:
    """The resolved configuration of one run; the untyped fields hold `_target_`s or a job's own section."""

    name: str = ""
    root: str = "runs"
    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    plan: bool = False
    debug: bool = False
    mixed_precision: str = "no"
    threads: int = 0
    job: Any = None
    model: Any = None
    models: Any = None
    data: Any = None
    objective: Any = None
    train: TrainConfig = field(default_factory=TrainConfig)
    recovery: StageConfig = field(default_factory=StageConfig)
    velocity: StageConfig = field(default_factory=StageConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    scorer: Any = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    curves: CurvesConfig = field(default_factory=CurvesConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)


ConfigStore.instance().store(name="schema", node=Config)
