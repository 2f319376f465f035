"""A sampler as numbers: what `scheduler.step` makes of its inputs is, at given timesteps, a weighted sum of them.

What the network sees in an evaluation is a weighted sum of the unit noise that sampling began with, of the noises that
a stochastic scheduler has drawn since, and of the predictions so far; so are the final latents. The weights are found
by running the scheduler on unit vectors, so that one way holds for DDIM, Euler, DPM-Solver and all others, and whoever
has the numbers needs no scheduler.

A scheduler that clips or thresholds the sample that it predicts goes on with the clipped one: this is a further vector
of the sums, and what is clipped is such a sum itself. Where a network predicts the variance, too, the noise of a step
is weighted pixel by pixel before it takes its place among the noises.

Axes: N noises, P predictions, S clipped samples, D = N + P + S.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimstep.eval.packaging.run_package import clipped, deviated
from slimstep.eval.sampling import next_latents
from slimstep.models.flow import FlowSteps, set_steps
from slimstep.models.schedulers import reads_variance

TOLERANCE = 1e-4  # between the sum and the scheduler, of the latents' size: schedulers compute in float32
ROUNDING = 1e-6  # of the largest latents on the way: Euler's at zero terminal SNR begin at 4096 times the unit noise


@dataclass(frozen=True)
class WeightedSum:
    """The weights of the first noises, predictions and clipped samples; all others have none."""

    noises: tuple[float, ...]
    predictions: tuple[float, ...]
    samples: tuple[float, ...] = ()

    def of(self, noises: list[Tensor], predictions: list[Tensor], samples: list[Tensor] | None = None) -> Tensor:
        weights, vectors = (*self.noises, *self.predictions, *self.samples), (*noises, *predictions, *(samples or []))
        return torch.stack([weight * vector for weight, vector in zip(weights, vectors, strict=True)]).sum(0)


@dataclass(frozen=True)
class Coefficients:
    """`inputs[k]` is what the network sees in its evaluation k, at `timesteps[k]`; `latents` is what it ends in.

    clip: how the predicted samples `samples[k]` are kept within bounds, {most} or, where they are thresholded
    dynamically, {most, ratio}; None where they are not. deviations: of the noise that is added after evaluation k, its
    least and its largest where the network predicts the variance, None where none is added; empty for all others.
    """

    timesteps: tuple[float, ...]
    inputs: tuple[WeightedSum, ...]
    latents: WeightedSum
    clip: dict[str, float] | None = None
    samples: tuple[WeightedSum, ...] = ()
    deviations: tuple[tuple[float, float] | None, ...] = ()


@dataclass(frozen=True)
class Step:
    """What a step made of z, without the noise that it adds; the weights of that noise for the least and the largest
    variance, which are one where none is predicted; and what it clipped, where it does."""

    z_D: Tensor
    weights: tuple[float, float]
    sample_D: Tensor | None
    scheduler: Any  # as the step leaves it


def sampler_coefficients(scheduler: Any, steps: int, flow: FlowSteps | None = None) -> Coefficients:
    """Those of so many sampling steps. ValueError for a scheduler whose steps are no such sums."""
    scheduler = copy.deepcopy(scheduler)
    set_steps(scheduler, steps, flow)
    count, learns = len(scheduler.timesteps), reads_variance(scheduler)
    basis_DD = torch.eye(3 * count + 1)  # the first noise and at most one a step, the predictions, the clipped samples
    noises, walked = 1, that_clips(scheduler)
    inputs, samples, deviations = list[WeightedSum](), list[WeightedSum](), list[tuple[float, float] | None]()
    z_D = basis_DD[0] * getattr(scheduler, "init_noise_sigma", 1)

    def weights(row_D: Tensor, predictions: int, clipped: int) -> WeightedSum:
        starts_counts = ((0, noises), (count + 1, predictions), (2 * count + 1, clipped))
        return WeightedSum(*(tuple(row_D[start : start + n].tolist()) for start, n in starts_counts))

    for k, t in enumerate(scheduler.timesteps):
        inputs.append(weights(network_input(walked, z_D, t), k, len(samples)))
        made = stepped(walked, basis_DD[count + 1 + k], t, z_D, basis_DD[2 * count + 1 + k])
        z_D, walked = made.z_D, made.scheduler
        if made.sample_D is not None:
            samples.append(weights(made.sample_D, k + 1, k))
        least, largest = made.weights
        if learns:
            deviations.append((least, largest) if largest else None)
        if largest:
            z_D = z_D + (1.0 if learns else largest) * basis_DD[noises]
            noises += 1
    if samples and len(samples) < count:
        refuse(scheduler)
    clip = clip_of(scheduler) if samples else None
    latents = weights(z_D, count, len(samples))
    timesteps = tuple(scheduler.timesteps.tolist())
    made_of = Coefficients(timesteps, tuple(inputs), latents, clip, tuple(samples), tuple(deviations))
    check(made_of, scheduler)
    return made_of


def network_input(scheduler: Any, z: Tensor, t: Tensor) -> Tensor:
    return scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z


def that_clips(scheduler: Any) -> Any:
    """A copy that thresholds where the scheduler clips, by a function that `stepped` puts in the place of its own."""
    made = copy.deepcopy(scheduler)
    if clip_of(scheduler):
        made.register_to_config(thresholding=True)
    return made


def clip_of(scheduler: Any) -> dict[str, float] | None:
    config = scheduler.config
    if config.get("thresholding"):
        return {"most": float(config.sample_max_value), "ratio": float(config.dynamic_thresholding_ratio)}
    return {"most": float(config.get("clip_sample_range", 1.0))} if config.get("clip_sample") else None


def stepped(scheduler: Any, prediction_D: Tensor, t: Tensor, z_D: Tensor, clipped_D: Tensor) -> Step:
    """A step that goes on with `clipped_D` where it clips."""
    predictions = [prediction_D]
    if reads_variance(scheduler):
        predictions = [torch.cat([prediction_D, torch.full_like(prediction_D, side)]) for side in (-1.0, 1.0)]
    every, weights, walked, seen = [], [], scheduler, list[Tensor]()
    for prediction in predictions:
        walked, other = (copy.deepcopy(scheduler) for _ in range(2))
        seen, _ = (goes_on_with(clipped_D, one) for one in (walked, other))
        one_D, other_D = (step(s, prediction, t, z_D, seed) for seed, s in enumerate((walked, other)))
        noise_D, other_noise_D = (drawn(z_D, seed) for seed in range(2))
        apart_D = noise_D - other_noise_D
        is_same = torch.equal(one_D, other_D)
        weights.append(0.0 if is_same else float((one_D - other_D) @ apart_D / (apart_D @ apart_D)))
        every.append(one_D - weights[-1] * noise_D)
    return Step(every[0], (weights[0], weights[-1]), seen[0] if len(seen) == 1 else None, walked)


def goes_on_with(clipped_D: Tensor, scheduler: Any) -> list[Tensor]:
    """Gives the scheduler's next step this vector for the sample that it would clip, and a list of those it would."""
    seen: list[Tensor] = []

    def thresholded(sample: Tensor) -> Tensor:
        seen.append(sample.flatten())
        return clipped_D.view_as(sample)

    scheduler._threshold_sample = thresholded
    return seen


def step(scheduler: Any, prediction: Tensor, t: Tensor, z: Tensor, seed: int) -> Tensor:
    """As eval/sampling.py takes it, of a tensor of any shape."""
    image, generators = (1, -1, 1, 1), [torch.Generator().manual_seed(seed)]
    return next_latents(scheduler, prediction.view(image), t, z.view(image), generators).view(z.shape)


def drawn(like: Tensor, seed: int) -> Tensor:
    """The noise that a step with this seed adds, in some weight."""
    return torch.randn(1, like.numel(), 1, 1, generator=torch.Generator().manual_seed(seed)).view(like.shape)


def check(coefficients: Coefficients, scheduler: Any) -> None:
    """ValueError where the coefficients do not give what the scheduler gives, of random predictions."""
    rows, clip = (*coefficients.inputs, coefficients.latents), coefficients.clip
    source = torch.Generator().manual_seed(0)
    vectors = torch.randn(1 + len(coefficients.timesteps), 512, generator=source)
    variances = torch.rand(len(coefficients.timesteps), 512, generator=source) * 2 - 1
    noises, predictions, samples = [vectors[0]], [*vectors[1:]], list[Tensor]()
    z = vectors[0] * getattr(scheduler, "init_noise_sigma", 1)
    walked, largest = copy.deepcopy(scheduler), z.abs().max()

    def is_near(k: int, expected: Tensor) -> bool:
        found = rows[k].of(noises, predictions[:k], samples)
        return bool((found - expected).abs().max() <= TOLERANCE * (1 + expected.abs().max()) + ROUNDING * largest)

    for k, t in enumerate(scheduler.timesteps):
        if not is_near(k, network_input(walked, z, t)):
            refuse(scheduler)
        if clip:
            sample = coefficients.samples[k].of(noises, predictions[: k + 1], samples)
            samples.append(torch.from_numpy(clipped(sample[None].numpy(), clip)[0]))
        given = torch.cat([predictions[k], variances[k]]) if coefficients.deviations else predictions[k]
        z = step(walked, given, t, z, seed=k)
        largest = torch.maximum(largest, z.abs().max())
        if len(rows[k + 1].noises) > len(noises):
            bounds = coefficients.deviations[k] if coefficients.deviations else None
            noise = drawn(z, k)
            noises.append(noise if bounds is None else noise * torch.from_numpy(deviated(variances[k].numpy(), bounds)))
    if not is_near(len(predictions), z):
        refuse(scheduler)


def refuse(scheduler: Any) -> None:
    clips = [key for key in ("clip_sample", "thresholding") if scheduler.config.get(key)]
    why = f", with {' and '.join(clips)}" if clips else ""
    raise ValueError(
        f"the steps of {type(scheduler).__name__} are no weighted sums of its inputs{why}: set another with "
        f"model.scheduler"
    )
