"""Flow matching's steps as diffusers' pipelines make them: FlowMatchEulerDiscreteScheduler and its shifts, and solvers
of other kinds with flow matching's σ (`use_flow_sigmas`), as Sana's DPM-Solver.

What else has continuous times, EDM's schedulers (models/edm.py), is asked here too for its steps.

A shift s moves times towards noise: σ = s·u / (1 + (s − 1)·u) for u from 0 to 1 (Esser et al. 2024, equation 23). It is
a number of the scheduler, or follows from an image's tokens, as the pipeline that calls the scheduler works it out.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from slimstep.models.edm import eulers_of, is_edm, stretched_edm


@dataclass(frozen=True)
class FlowSteps:
    """How a pipeline of flow matching has its scheduler make steps.

    tokens: of an image, for a shift that depends on them. own_sigmas: whether the pipeline gives the scheduler its σ
    before the shift, 1 down to 1/N, as FLUX's does. Others leave them to the scheduler, which goes down to its last
    training time, so that the last of few steps does next to nothing.
    """

    tokens: int = 0
    own_sigmas: bool = False

    def options(self, scheduler: Any, steps: int) -> dict[str, Any]:
        """What `set_timesteps` is given beside the number of steps."""
        options: dict[str, Any] = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if self.own_sigmas else {}
        if scheduler.config.get("use_dynamic_shifting"):
            options["mu"] = resolution_shift(scheduler, self.tokens)
        return options


def set_steps(scheduler: Any, steps: int, flow: FlowSteps | None = None) -> None:
    """The scheduler's `set_timesteps` as the model's pipeline calls it; `flow` is None for pipelines that give it
    nothing but the number of steps."""
    scheduler.set_timesteps(steps, **(flow.options(scheduler, steps) if flow else {}))


def is_flow(scheduler: Any) -> bool:
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or is_flow_solver(scheduler)


def is_flow_solver(scheduler: Any) -> bool:
    """Whether a solver of another kind takes flow matching's σ, and a network that predicts the flow."""
    config = scheduler.config
    takes_flow = config.get("use_flow_sigmas") and config.get("flow_shift") is not None
    return bool(takes_flow) and config.get("prediction_type") == "flow_prediction"


def is_continuous(scheduler: Any) -> bool:
    """Whether its times are continuous: a flow's, or EDM's."""
    return is_flow(scheduler) or is_edm(scheduler)


def eulers(scheduler: Any) -> Any:
    """The scheduler that makes Euler's steps on a flow, with the same shift, or on EDM's σ: itself, or one in a
    solver's place."""
    if is_edm(scheduler):
        return eulers_of(scheduler)
    if not is_flow_solver(scheduler):
        return scheduler
    fields = {"num_train_timesteps": scheduler.config.num_train_timesteps, "shift": scheduler.config.flow_shift}
    return FlowMatchEulerDiscreteScheduler(**fields)


def prediction_type_of(scheduler: Any) -> str:
    """What the scheduler's network predicts: `flow`, `edm`, or what its configuration says."""
    if is_edm(scheduler):
        return "edm"
    return "flow" if is_flow(scheduler) else scheduler.config.get("prediction_type")


def check_flow(scheduler: Any) -> None:
    """ValueError for a scheduler whose steps are not those of a flow from noise to the sample without new noise."""
    for name in ("invert_sigmas", "stochastic_sampling"):
        if scheduler.config.get(name):
            raise ValueError(f"the model's {type(scheduler).__name__} has {name}=True, which is not supported")
    if is_flow_solver(scheduler) and scheduler.config.get("use_dynamic_shifting"):
        name = type(scheduler).__name__
        raise ValueError(f"the model's {name} has use_dynamic_shifting=True, which only Euler's scheduler has here")


def resolution_shift(scheduler: Any, tokens: int) -> float:
    """μ, which grows linearly with an image's tokens, as all pipelines of diffusers have it."""
    config = scheduler.config
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (most - fewest)
    return tokens * slope + (low - slope * fewest)


def shift_of(scheduler: Any, flow: FlowSteps) -> float:
    """s: that of the scheduler, or the one for so many tokens."""
    if is_flow_solver(scheduler):
        return scheduler.config.flow_shift
    if not scheduler.config.get("use_dynamic_shifting"):
        return scheduler.shift
    mu = resolution_shift(scheduler, flow.tokens)
    return math.exp(mu) if scheduler.config.get("time_shift_type", "exponential") == "exponential" else mu


def stretched(scheduler: Any, steps: int, flow: FlowSteps | None) -> Any:
    """A scheduler of which each of so many steps removes noise: the last starts at the shifted 1/steps, or above.

    diffusers spends one step of any number on the last training time, or on the `shift_terminal` that a model has for
    many steps. The right one stretches σ in whatever pipeline, by configuration alone; one step has none, since
    diffusers would make 0 / 0 of it. The same scheduler where it is so already. EDM's has another σ_min. flow: None
    for EDM's.
    """
    if flow is None:
        return stretched_edm(scheduler, steps)
    if steps == 1:
        return from_config(scheduler, shift_terminal=None) if scheduler.config.get("shift_terminal") else scheduler
    made = copy.deepcopy(scheduler)
    set_steps(made, steps, flow)
    last = shifted(torch.tensor(1 / steps), shift_of(scheduler, flow)).item()
    return scheduler if made.sigmas[-2] > 0.99 * last else from_config(scheduler, shift_terminal=last)


def from_config(scheduler: Any, **changes: Any) -> Any:
    """A scheduler of the same class and configuration, but for these fields."""
    return type(scheduler).from_config(scheduler.config, **changes)


def shifted(u: Tensor, shift: float) -> Tensor:
    return shift * u / (1 + (shift - 1) * u)


def unshifted(sigma: Tensor, shift: float) -> Tensor:
    """The inverse of `shifted`."""
    return sigma / (shift - (shift - 1) * sigma)
