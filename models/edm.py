"""EDM's preconditioning (Karras et al. 2022) as diffusers' schedulers have it: Playground v2.5, CosXL, and, in an
EulerDiscreteScheduler with continuous timesteps, Stable Video Diffusion.

A sample with noise is x = x0 + σ ε. The network F sees c_in x at the time c_noise = ¼ log σ, and its answer stands for
the sample c_skip x + c_out F (equation 7 and table 1). A sampler's σ go from σ_max to σ_min, evenly in σ^(1/ρ)
(equation 5), or, where ρ is None, in log σ; its last step goes from there to 0.

Axes: B batch, N steps of a sampler.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler
from torch import Tensor

RHO = 7.0  # of EulerDiscreteScheduler, which has no field for it
SHARED = ("sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "num_train_timesteps", "prediction_type", "rho",
          "final_sigmas_type")  # fmt: skip  # by EDM's two schedulers


@dataclass(frozen=True)
class Preconditioned:
    """What an EDM network predicts: F = sign · (c_in σ x0 / σ_d − σ_d c_in ε), which is −v of x0 / σ_d, or v itself.

    sigma_data: σ_d, the deviation of samples that the network is scaled for. sign: that of c_out, −1 where the
    scheduler's prediction_type is v_prediction.
    """

    sigma_data: float
    sign: int


@dataclass(frozen=True)
class Sigmas:
    """From σ_max to σ_min, by shares of the way: 0 at σ_min, 1 at σ_max."""

    sigma_min: float
    sigma_max: float
    rho: float | None

    def at(self, share_B: Tensor) -> Tensor:
        low, high = self.bend(torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64)).tolist()
        bent_B = low + share_B * (high - low)
        return bent_B.exp() if self.rho is None else bent_B**self.rho

    def shares(self, sigma_B: Tensor) -> Tensor:
        """The inverse of `at`; 0 for less than σ_min."""
        low, high = self.bend(torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64)).tolist()
        return ((self.bend(sigma_B.clamp(min=self.sigma_min)) - low) / (high - low)).clamp(min=0)

    def bend(self, sigma: Tensor) -> Tensor:
        return sigma.log() if self.rho is None else sigma ** (1 / self.rho)


def is_edm(scheduler: Any) -> bool:
    return isinstance(scheduler, EDMEulerScheduler | EDMDPMSolverMultistepScheduler) or is_continuous_euler(scheduler)


def is_continuous_euler(scheduler: Any) -> bool:
    """Whether it is Stable Video Diffusion's scheduler, of the same times, with σ_d = 1."""
    config = scheduler.config
    own = {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
    is_own = isinstance(scheduler, EulerDiscreteScheduler) and all(config.get(key) == own[key] for key in own)
    return is_own and config.get("sigma_min") is not None and config.get("sigma_max") is not None


def check_edm(scheduler: Any) -> None:
    """ValueError for a scheduler whose network is not preconditioned as the paper has it, or that ends in noise."""
    name, config = type(scheduler).__name__, scheduler.config
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"the model's {name} has prediction_type={config.prediction_type}; EDM's networks predict "
                         "epsilon or v_prediction")  # fmt: skip
    if config.final_sigmas_type != "zero":
        raise ValueError(f"the model's {name} has final_sigmas_type={config.final_sigmas_type}, with which images keep "
                         "noise; set zero in its scheduler_config.json")  # fmt: skip
    if not 0 < config.sigma_min < config.sigma_max:
        raise ValueError(f"the model's {name} has sigma_min={config.sigma_min} and sigma_max={config.sigma_max}; they "
                         "must be 0 < sigma_min < sigma_max")  # fmt: skip


def preconditioning_of(scheduler: Any) -> Preconditioned:
    config = scheduler.config
    return Preconditioned(config.get("sigma_data", 1.0), -1 if config.prediction_type == "v_prediction" else 1)


def sigmas_of(scheduler: Any) -> Sigmas:
    config = scheduler.config
    rho = None if config.get("sigma_schedule", "karras") == "exponential" else config.get("rho", RHO)
    return Sigmas(config.sigma_min, config.sigma_max, rho)


def eulers_of(scheduler: Any) -> Any:
    """The scheduler that makes Euler's steps on the same σ: itself, or one in a solver's place."""
    if not isinstance(scheduler, EDMDPMSolverMultistepScheduler):
        return scheduler
    return EDMEulerScheduler(**{name: scheduler.config[name] for name in SHARED})


def stretched_edm(scheduler: Any, steps: int) -> Any:
    """A scheduler of which each of so many steps removes noise: the last starts where one of as many equal shares does.

    diffusers spends the last step of any number on σ_min, where there is no noise left to remove. A higher σ_min
    stretches the others in whatever pipeline, by configuration alone, and grids of 2, 4, 8 … steps nest.
    """
    if steps == 1:
        return scheduler
    sigma_min = sigmas_of(scheduler).at(torch.tensor(1 / steps, dtype=torch.float64)).item()
    return type(scheduler).from_config(scheduler.config, sigma_min=sigma_min)


def time_of(sigma_B: Tensor) -> Tensor:
    """c_noise, −∞ for clean samples."""
    return 0.25 * sigma_B.log()


def sigma_at(t_B: Tensor) -> Tensor:
    return torch.exp(4 * t_B)


def times_of(scheduler: Any) -> Tensor:
    """[N + 1]: the times at which the steps of a scheduler start, and where the last one lands."""
    times_N = scheduler.timesteps.cpu().float()
    last = scheduler.sigmas.cpu().float()[-1]
    return torch.cat([times_N, time_of(last)[None] if last > 0 else torch.tensor([-math.inf])])
