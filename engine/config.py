"""The keys that every run has, typed: a misspelt one is an error before anything runs.

Every folder adds those of its jobs in a config.py of its own, and configs/schema.py joins them.
"""

import math
import os
from dataclasses import dataclass, field
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from slimstep.engine.checks import check_choice, check_minimum
from slimstep.engine.launcher import precision_of

SCHEDULES = ("cosine", "constant")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor")

OmegaConf.register_new_resolver("launcher_precision", lambda: precision_of(os.environ), replace=True)


@dataclass
class TrainConfig:
    """One call of the training loop.

    `batch_size` is per process and micro-step; `optimizer` is one of engine/optimizers.py, which says what each keeps;
    `learning_rates` are those of networks that the objective trains beside the student, where they differ from its own;
    `lora_rank` above 0 trains a low-rank update of that rank alone, which is added to the weights at the end;
    `ema_decay` 0 keeps no EMA; `compile` is torch.compile; `channels_last` is the memory format of convolutions
    that GPUs, and some CPUs, are faster with. Every `evaluate_every` steps, and at the end, the student with its EMA
    weights draws images of the calibration prompts, which are scored and kept (0: never); with `keep_best` the stage's
    finished weights are those of the best of these scores.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulation: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    learning_rates: Any = None  # {network: rate}; a typed table that begins as None takes none from the command line
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    weight_decay: float = 0.01
    warmup_steps: int = 50
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    lora_rank: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    keep_best: bool = False
    workers: int = 0
    gradient_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        check_choice("train", self, schedule=SCHEDULES, optimizer=OPTIMIZERS)
        names = ("steps", "batch_size", "accumulation", "checkpoint_every", "keep_checkpoints", "log_every")
        check_minimum("train", self, 1, *names)
        if len(self.betas) != 2:
            raise ValueError(f"train: betas={self.betas} must be two numbers")
        rates = {f"learning_rates.{name}": rate for name, rate in as_rates(self.learning_rates).items()}
        for name, value in {"learning_rate": self.learning_rate, "max_grad_norm": self.max_grad_norm, **rates}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"train: {name}={value} must be above 0")
        names = ("weight_decay", "warmup_steps", "workers", "ema_decay", "lora_rank", "evaluate_every")
        check_minimum("train", self, 0, *names)
        if self.keep_best and not self.evaluate_every:
            raise ValueError("train.keep_best=true needs train.evaluate_every, the steps between two evaluations")
        if not all(0 <= share < 1 for share in (self.ema_decay, *self.betas)):
            raise ValueError(f"train: ema_decay={self.ema_decay} and betas={self.betas} must lie in [0, 1)")


def as_rates(value: Any) -> dict[str, float]:
    """{network: rate}. ValueError for what is no such table."""
    table = value or {}
    if not isinstance(table, dict) or not all(isinstance(rate, (int, float)) for rate in table.values()):
        raise ValueError(f"train.learning_rates={value} must be a table of numbers, as {{fake_score: 2e-5}}")
    return table


@dataclass
class StageConfig:
    """A training stage with an objective of its own."""

    objective: Any = None
    train: TrainConfig = field(default_factory=TrainConfig)


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
    """The resolved configuration of one run; the untyped fields hold `_target_`s or a job's own section.

    `mixed_precision` is no, bf16 or fp16; where it is not given, the value of accelerate's launcher, else no.
    A run has a job, or `stages`: {experiment: what changes in it}, which it runs in turn (engine/workflow.py); with
    `restart`, from that stage on anew.
    """

    name: str = ""
    root: str = "runs"
    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    plan: bool = False
    debug: bool = False
    mixed_precision: str = "${launcher_precision:}"
    threads: int = 0
    job: Any = None
    stages: Any = None
    restart: str | None = None
    objective: Any = None
    train: TrainConfig = field(default_factory=TrainConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    @staticmethod
    def check(config: DictConfig) -> None:
        """ValueError for what no single field can tell; the folders above have their own."""


def as_dict(section: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """A section of the configuration as a plain table; what refers to other keys is filled in, unless not `resolve`."""
    return cast(dict[str, Any], OmegaConf.to_container(section, resolve=resolve))


def schema() -> DictConfig:
    """All keys there are, with their types and defaults: configs/schema.py."""
    return ConfigStore.instance().load("schema.yaml").node
