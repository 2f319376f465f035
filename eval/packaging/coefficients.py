"""A sampler as numbers: what `scheduler.step` makes of its inputs is, at given timesteps, a weighted sum of them.

What the network sees in an evaluation is a weighted sum of the unit noise that sampling began with, of the noises that
a stochastic scheduler has drawn since, and of the predictions so far; so are the final latents. The weights are found
by running the scheduler on unit vectors, so that one way holds for DDIM, Euler, DPM-Solver and all others, and whoever
has the numbers needs no scheduler.

Axes: N noises, P predictions, D = N + P.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimstep.eval.sampling import next_latents
from slimstep.models.flow import FlowSteps, set_steps

TOLERANCE = 1e-4  # between the sum and the scheduler, of the latents' size: schedulers compute in float32
ROUNDING = 1e-6  # of the largest latents on the way: Euler's at zero terminal SNR begin at 4096 times the unit noise


@dataclass(frozen=True)
class WeightedSum:
    """The weights of the first noises and of the first predictions; all others have none."""

    noises: tuple[float, ...]
    predictions: tuple[float, ...]

    def of(self, noises: list[Tensor], predictions: list[Tensor]) -> Tensor:
        weights, vectors = (*self.noises, *self.predictions), (*noises, *predictions)
        return torch.stack([weight * vector for weight, vector in zip(weights, vectors, strict=True)]).sum(0)


@dataclass(frozen=True)
class Coefficients:
    """`inputs[k]` is what the network sees in its evaluation k, at `timesteps[k]`; `latents` is what it ends in."""

    timesteps: tuple[float, ...]
    inputs: tuple[WeightedSum, ...]
    latents: WeightedSum


def sampler_coefficients(scheduler: Any, steps: int, flow: FlowSteps | None = None) -> Coefficients:
    """Those of so many sampling steps. ValueError for a scheduler whose steps are no weighted sums: those that
    clip or threshold the image."""
    scheduler = copy.deepcopy(scheduler)
    set_steps(scheduler, steps, flow)
    count = len(scheduler.timesteps)
    basis_DD = torch.eye(2 * count + 1)  # the first noise and at most one a step, then the predictions
    noises, inputs, walked = 1, [], copy.deepcopy(scheduler)
    z_D = basis_DD[0] * getattr(scheduler, "init_noise_sigma", 1)

    def weights(row_D: Tensor, predictions: int) -> WeightedSum:
        first = count + 1
        return WeightedSum(tuple(row_D[:noises].tolist()), tuple(row_D[first : first + predictions].tolist()))

    for k, t in enumerate(scheduler.timesteps):
        inputs.append(weights(network_input(walked, z_D, t), k))
        z_D, weight, walked = stepped(walked, basis_DD[count + 1 + k], t, z_D)
        if weight:
            z_D = z_D + weight * basis_DD[noises]
            noises += 1
    coefficients = Coefficients(tuple(scheduler.timesteps.tolist()), tuple(inputs), weights(z_D, count))
    check(coefficients, scheduler)
    return coefficients


def network_input(scheduler: Any, z: Tensor, t: Tensor) -> Tensor:
    return scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z


def stepped(scheduler: Any, prediction_D: Tensor, t: Tensor, z_D: Tensor) -> tuple[Tensor, float, Any]:
    """A step without the noise that it adds, the weight of that noise, and the scheduler as the step leaves it."""
    walked = copy.deepcopy(scheduler)
    one_D, other_D = (step(s, prediction_D, t, z_D, seed) for seed, s in enumerate((walked, copy.deepcopy(scheduler))))
    if torch.equal(one_D, other_D):
        return one_D, 0.0, walked
    noise_D, other_noise_D = (drawn(z_D, seed) for seed in range(2))
    apart_D = noise_D - other_noise_D
    weight = float((one_D - other_D) @ apart_D / (apart_D @ apart_D))
    return one_D - weight * noise_D, weight, walked


def step(scheduler: Any, prediction: Tensor, t: Tensor, z: Tensor, seed: int) -> Tensor:
    """As eval/sampling.py takes it, of a tensor of any shape."""
    image, generators = (1, -1, 1, 1), [torch.Generator().manual_seed(seed)]
    return next_latents(scheduler, prediction.view(image), t, z.view(image), generators).view(z.shape)


def drawn(like: Tensor, seed: int) -> Tensor:
    """The noise that a step with this seed adds, in some weight."""
    return torch.randn(1, like.numel(), 1, 1, generator=torch.Generator().manual_seed(seed)).view(like.shape)


def check(coefficients: Coefficients, scheduler: Any) -> None:
    """ValueError where the coefficients do not give what the scheduler gives, of random predictions."""
    rows = *coefficients.inputs, coefficients.latents
    vectors = torch.randn(1 + len(coefficients.timesteps), 512, generator=torch.Generator().manual_seed(0))
    noises, predictions = [vectors[0]], [*vectors[1:]]
    z = vectors[0] * getattr(scheduler, "init_noise_sigma", 1)
    walked, largest = copy.deepcopy(scheduler), z.abs().max()

    def is_near(k: int, expected: Tensor) -> bool:
        found = rows[k].of(noises, predictions[:k])
        return bool((found - expected).abs().max() <= TOLERANCE * (1 + expected.abs().max()) + ROUNDING * largest)

    for k, t in enumerate(scheduler.timesteps):
        if not is_near(k, network_input(walked, z, t)):
            refuse(scheduler)
        z = step(walked, predictions[k], t, z, seed=k)
        largest = torch.maximum(largest, z.abs().max())
        noises += [drawn(z, k)] * (len(rows[k + 1].noises) - len(rows[k].noises))
    if not is_near(len(predictions), z):
        refuse(scheduler)


def refuse(scheduler: Any) -> None:
    clips = [key for key in ("clip_sample", "thresholding") if scheduler.config.get(key)]
    why = f", by {' and '.join(clips)}" if clips else ""
    raise ValueError(
        f"the steps of {type(scheduler).__name__} are no weighted sums of its inputs{why}: set another with "
        f"model.scheduler"
    )
