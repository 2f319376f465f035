"""The configuration of a run, typed: a misspelt key is an error before anything runs. Its sections: engine/sections."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from engine.launcher import precision_of
from engine.sections.judging import (
    BenchmarkConfig,
    CurvesConfig,
    DrawingConfig,
    EvalConfig,
    EvaluationConfig,
    LatentsConfig,
    ScoringConfig,
)
from engine.sections.pruning import DecoderConfig, LatencyConfig, SearchConfig
from engine.sections.stepping import LadderConfig
from engine.sections.training import StageConfig, TrainConfig

OmegaConf.register_new_resolver("launcher_precision", lambda: precision_of(os.environ), replace=True)


@dataclass
class TrackerConfig:
    """Where metrics, images and tables go beside metrics.jsonl."""

    log_with: str | None = None
    project: str = "slimstep"
    mode: str = "offline"


@dataclass
class HandoverConfig:
    """Folders of pipelines: `model` gives all but the VAE, `vae` gives that."""

    model: str = ""
    vae: str = ""


@dataclass
class PageConfig:
    """Finished runs that a page is about: an evaluation, and the benchmark of the same models, the teacher first and
    the student last. `stages` are the runs beside its own that made them."""

    evaluation: str = ""
    benchmark: str = ""
    stages: list[str] = field(default_factory=list)


@dataclass
class RatesConfig:
    """Rows a second of one process, for the hours that plan=true tells; null is measured by it."""

    forward: float | None = None
    sampling: float | None = None
    training: float | None = None
    decoding: float | None = None

    def __post_init__(self) -> None:
        for name in ("forward", "sampling", "training", "decoding"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"rates.{name}={value} must be above 0")


@dataclass
class RunConfig:
    """`overwrite` moves a run directory aside that another configuration has made."""

    overwrite: bool = False


@dataclass
class Config:
    """The resolved configuration of one run; the untyped fields hold `_target_`s or a job's own section.

    `mixed_precision` is no, bf16 or fp16; where it is not given, what accelerate's launcher was told, else no.
    A run has a job, or `stages`: {experiment: what changes in it}, which it runs in turn (engine/chain.py); with
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
    model: Any = None
    models: Any = None
    data: Any = None
    objective: Any = None
    train: TrainConfig = field(default_factory=TrainConfig)
    recovery: StageConfig = field(default_factory=StageConfig)
    velocity: StageConfig = field(default_factory=StageConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    sampling: DrawingConfig = field(default_factory=DrawingConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    scorer: Any = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    curves: CurvesConfig = field(default_factory=CurvesConfig)
    handover: HandoverConfig = field(default_factory=HandoverConfig)
    page: PageConfig = field(default_factory=PageConfig)
    rates: RatesConfig = field(default_factory=RatesConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)


ConfigStore.instance().store(name="schema", node=Config)
