"""Sections about training, and what is trained on."""

import math
from dataclasses import dataclass, field
from typing import Any

from engine.sections.checks import at_least

STORAGE_DTYPES = ("float32", "float16")
SCHEDULES = ("cosine", "constant")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor")


@dataclass
class TrainConfig:
    """One call of the training loop.

    `batch_size` is per process and micro-step; `optimizer` is one of engine/optimizers.py, which says what each keeps;
    `ema_decay` 0 keeps no averages; `compile` is torch.compile; `channels_last` is the memory format of convolutions
    that GPUs, and some CPUs, are faster with.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulation: int = 1
    optimizer: str = "adamw"
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
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"train.optimizer={self.optimizer!r} is unknown; choose from {OPTIMIZERS}")
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
    """Where encoded images and texts lie, and how: `data/cache.py` tells; `batch_size` counts images."""

    folder: str = "runs/cache"
    batch_size: int = 64
    dtype: str = "float32"
    shard_size: int = 512
    workers: int = 0
    verify: bool = True

    def __post_init__(self) -> None:
        at_least("data.cache", self, 1, "batch_size", "shard_size")
        at_least("data.cache", self, 0, "workers")
        if self.dtype not in STORAGE_DTYPES:
            raise ValueError(f"data.cache.dtype={self.dtype!r} is unknown; choose from {', '.join(STORAGE_DTYPES)}")


@dataclass
class DataConfig:
    """What every `data` group has; its other keys belong to the constructors of its pairs and prompts."""

    resolution: int | None = None
    prompt_file: str | None = None
    prompt_column: str | None = None
    pairs: Any = None
    prompts: Any = None
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if self.resolution is not None:
            at_least("data", self, 1, "resolution")
