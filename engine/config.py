"""The knobs every job shares, typed: a misspelt one is an error before anything runs."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

SCHEDULES = ("cosine", "constant")


@dataclass
class TrainConfig:
    """One call of the training loop. `batch_size` is per process and micro-step."""

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

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"train.schedule={self.schedule!r} is unknown; choose from {SCHEDULES}")
        for name in ("steps", "batch_size", "accumulation", "checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")


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
class Config:
    """The resolved configuration of one run; the untyped fields hold `_target_`s or a job's own section."""

    name: str = ""
    root: str = "runs"
    seed: int = 0
    debug: bool = False
    mixed_precision: str = "no"
    threads: int = 0
    job: Any = None
    model: Any = None
    data: Any = None
    objective: Any = None
    train: TrainConfig = field(default_factory=TrainConfig)
    recovery: StageConfig = field(default_factory=StageConfig)
    search: Any = None
    latency: Any = None
    scoring: Any = None
    eval: Any = None
    scorer: Any = None
    tracker: TrackerConfig = field(default_factory=TrackerConfig)


ConfigStore.instance().store(name="schema", node=Config)
