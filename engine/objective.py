"""What the training loop trains with: an objective, the networks that it trains, and what it asks of a job.

A plain callable `(network, batch, generator) -> (loss, metrics)` is an objective of the student alone. One that trains
more networks, as a discriminator or the score of the student's own images, follows `Objective`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from slimstep.engine.config import TrainConfig
from slimstep.engine.low_rank import check_low_rank
from slimstep.engine.optimizers import check_optimizer
from slimstep.engine.sharding import check_sharding, is_deepspeed, is_sharded

Batch = dict[str, Any]
Metrics = dict[str, Tensor]
STUDENT = "student"


@dataclass(frozen=True)
class CachedTargets:
    """Teacher targets that are computed once, before the training.

    Every image has `per_image` of them, each with a noise, one of `num_steps` steps and a caption that never change;
    a share of `caption_dropout` of them has the empty caption. `compute(batch)` gives (target [B, C, H, W], gap [B]).
    """

    per_image: int
    num_steps: int
    caption_dropout: float
    compute: Callable[[Batch], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Requirements:
    """What an objective asks of the student and of its training. A class declares it; `cached_targets` depends on the
    arguments, and an instance adds it.

    `distils_steps`: it makes students that need fewer steps. `sampler`: the diffusers scheduler that its students are
    exported with, None where any that follows the ODE will do; `sampler_options` are options of that scheduler, each
    with the argument of the objective that sets it. `guidance_embedding`: its students have one. `guides_itself`: its
    students have the guidance, its argument `guidance_scale`, in their weights, and are sampled without.
    `own_times_only`: its students are trained at the timesteps of their own steps, and at no others.
    `initial_student`: it is given what makes the student as it is before the training, frozen. `feature_hooks`: it
    reads features by hooks, which a compiled network does not call. `networks` are the names of those that are
    trained beside the student. `limits` are those between which the mean of a metric since it was last logged must
    lie, or the training has diverged, and stops.
    """

    distils_steps: bool = False
    sampler: str | None = None
    sampler_options: Mapping[str, str] = field(default_factory=dict)
    guidance_embedding: bool = False
    guides_itself: bool = False
    own_times_only: bool = False
    initial_student: bool = False
    feature_hooks: bool = False
    networks: tuple[str, ...] = ()
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    cached_targets: CachedTargets | None = None


class Objective(Protocol):
    """What the loop minimises, with the networks that are trained beside the student.

    `networks`, those that `requires` names, are trained in place, each by an optimiser of its own, and are not kept
    when the stage is finished; they may be made when they are first asked for, as the training begins.
    `updates(step)` names the networks whose optimisers step in this step, in order; a name may stand there several
    times, and each time it sees new samples. It is a function of `step` alone, for a continued run asks again.
    `loss(networks, batch, generator, update)` is what the network `update` minimises; `networks` has the student, too.
    Only the network `update` gets gradients. Each call has a generator with a seed of its own. Beside its samples a
    batch has "progress", the share of the training that is done, and "nth", the place of the update in its step. What
    an objective keeps must be of the same step.
    """

    networks: Mapping[str, nn.Module]
    requires: Requirements

    def updates(self, step: int) -> Sequence[str]: ...

    def loss(
        self, networks: Mapping[str, nn.Module], batch: Batch, generator: torch.Generator, update: str
    ) -> tuple[Tensor, Metrics]: ...


@dataclass(frozen=True)
class Cost:
    """What a sample of a training step costs: rows of the denoiser without a gradient, and with one; rows that are
    guided, and so run twice, count once. `beside`: how many weights are trained beside the student's."""

    rows: float
    trained_rows: float = 1.0
    beside: int = 0


PlainObjective = Callable[[nn.Module, Batch, torch.Generator], tuple[Tensor, Metrics]]


class StudentObjective:
    """A plain callable as an `Objective`: it trains the student alone, and requires what it declares, if anything."""

    networks: Mapping[str, nn.Module] = {}

    def __init__(self, call: PlainObjective):
        self.call, self.requires = call, requirements(call)

    def updates(self, step: int) -> Sequence[str]:
        return (STUDENT,)

    def loss(
        self, networks: Mapping[str, nn.Module], batch: Batch, generator: torch.Generator, update: str
    ) -> tuple[Tensor, Metrics]:
        return self.call(networks[STUDENT], batch, generator)


def requirements(objective: Any) -> Requirements:
    """What an objective, or its class, declares; a plain function declares nothing."""
    return getattr(objective, "requires", Requirements())


def as_objective(objective: Objective | PlainObjective) -> Objective:
    """The objective itself, or the plain callable as one."""
    if hasattr(objective, "loss"):
        return cast(Objective, objective)
    return StudentObjective(objective)


def check_requirements(
    objective: Objective | PlainObjective, config: TrainConfig, accelerator: Accelerator, is_monitored: bool = False
) -> None:
    """ValueError where the objective cannot be trained as `config` and accelerate's launcher ask."""
    watching = f"train.evaluate_every={config.evaluate_every}"
    if config.evaluate_every and not is_monitored:
        raise ValueError(f"{watching} is for the stages of a distillation, and this is none; set 0")
    if config.evaluate_every and (is_sharded(accelerator) or is_deepspeed(accelerator)):
        raise ValueError(f"{watching} does not go with FSDP or DeepSpeed; use DDP")
    name, objective = type(objective).__name__, as_objective(objective)
    check_optimizer(config)
    check_low_rank(config.lora_rank, accelerator)
    names = objective.requires.networks
    check_sharding(config, accelerator, names)
    if config.compile and objective.requires.feature_hooks:
        raise ValueError(f"{name} reads features with hooks: its train.compile must be false")
    assert STUDENT not in names, f"{name} trains a network of its own under the name {STUDENT!r}"
    if unknown := sorted(set(config.learning_rates or {}) - set(names)):
        trains = ", ".join(names) or "nothing"
        raise ValueError(f"train.learning_rates names {unknown}; {name} trains {trains} beside the student")


class ObjectiveAround:
    """An objective that changes the batch or the loss of another one; which, a subclass says by its `loss`."""

    def __init__(self, objective: Objective | PlainObjective):
        self.objective = as_objective(objective)
        self.requires = self.objective.requires

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return self.objective.networks

    def updates(self, step: int) -> Sequence[str]:
        return self.objective.updates(step)
