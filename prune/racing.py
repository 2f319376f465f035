"""A race of changes: prompts are spent only where they may still change what is decided.

A screen says how far one prediction is off after each change (screening.py). Then, until the decision is settled, those
are drawn, a prompt at a time, that are taken in some and left in others of the decisions that are still possible. Two
things make few prompts enough:

- What a change loses is taken to be proportional to the squared error of its pictures, within a factor (`estimated`).
  That error is known within a factor from the screen, and well after few prompts.
- The decision is settled where its regret is small: what it is expected to lose more than the best one, over draws from
  the estimates. Blocks that lose the same to within this need no order.

Axes: N changes, P prompts, S draws.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from slimstep.engine.files import write_tensors
from slimstep.eval.metrics.compare import mean_and_error
from slimstep.prune.scores import Drawing, none_if_nan, picture_error

log = logging.getLogger("slimstep")

DRAWS, OPEN = 100, 0.05  # decisions that are drawn; a change is open where it is taken in more and in less than so many
AT_FIRST = 0.25  # the share of changes that is drawn at the first look, open or not: they tell the losses' scale

# Standard deviations of logarithms, as 512 prompts of the bundled UNet have them (benchmarks/search-cost).
SCREENED = 0.6  # of the pictures' error, around what the screen says
PICTURED = 0.8  # of the pictures' error on one prompt
PROPORTIONAL = 0.6  # of the loss, around its proportion to the pictures' error
LEAST_ERROR = 1e-6  # that has a logarithm
LEAST_SHARE = 0.1  # of its proportion to the pictures' error that a loss is at least

Choose = Callable[[Sequence[float]], set[int]]  # the places of the changes that a search takes, by what each loses


@dataclass(frozen=True)
class Estimate:
    """What changes lose, as far as is known: log-normal, of this mean and standard deviation; and their pictures'
    errors. All of shape [N]."""

    mean_N: np.ndarray
    sd_N: np.ndarray
    error_N: np.ndarray

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """What they may lose, of shape [N]. Positive: where what a change gained on one prompt by chance is believed,
        it is free, and Algorithm 1 takes it first."""
        deviation_N = np.sqrt(np.log1p((self.sd_N / self.mean_N) ** 2))
        logs_N = np.log(self.mean_N) - deviation_N**2 / 2 + deviation_N * generator.standard_normal(len(self.mean_N))
        return np.exp(logs_N)


@dataclass(frozen=True)
class Look:
    """What was known at a moment of a race. taken_N: in what share of the draws each change is taken."""

    images: int
    regret: float
    taken_N: np.ndarray

    @property
    def open_N(self) -> np.ndarray:
        return left_open(self.taken_N)


def left_open(taken_N: np.ndarray) -> np.ndarray:
    """Which changes are taken in some of the draws and left in others, as booleans [N]."""
    return (taken_N > OPEN) & (taken_N < 1 - OPEN)


def estimated(
    losses: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], screened_N: np.ndarray
) -> Estimate:
    """The estimate from the losses of every change and the errors of its pictures, prompt by prompt, of some changes
    none; and from what the screen says of all.

    log error is normal around log screened + a, SCREENED wide, and that of a prompt around it, PICTURED wide. A loss is
    c · error · factor, the factor's logarithm PROPORTIONAL wide; a prompt's has a variance k · error. a, c and k are
    those of all changes that were drawn (empirical Bayes: Morris 1983), but c is no nearer to 0 than the standard error
    of the losses' sum.
    """
    count_N, floor = np.array([len(own) for own in losses]), LEAST_ERROR
    logs_N = np.log(np.maximum(screened_N, floor))
    drawn = np.flatnonzero(count_N)
    if not len(drawn):
        error_N = np.exp(logs_N)
        return Estimate(error_N, error_N * math.sqrt(math.expm1(SCREENED**2)), error_N)
    seen_N = np.zeros(len(logs_N))
    seen_N[drawn] = [np.log(np.maximum(errors[n], floor)).mean() for n in drawn]
    shift = (seen_N - logs_N)[drawn].mean()
    weight_N = SCREENED**2 / (SCREENED**2 + PICTURED**2 / np.maximum(count_N, 1)) * (count_N > 0)
    error_N = np.exp(weight_N * seen_N + (1 - weight_N) * (shift + logs_N))
    known_N = (1 - weight_N) * SCREENED**2  # the variance of log error

    all_P = np.concatenate([losses[n] for n in drawn])
    scale = max(all_P.sum(), np.linalg.norm(all_P), floor) / (count_N * error_N).sum()
    expected_N = scale * error_N
    prior_N = expected_N**2 * np.expm1(PROPORTIONAL**2 + known_N)
    off = sum(float(np.square(np.subtract(losses[n], expected_N[n])).sum()) for n in drawn)
    noise_N = off / (count_N * error_N).sum() * error_N / np.maximum(count_N, 1)
    trust_N = prior_N / (prior_N + noise_N) * (count_N > 0)
    measured_N = np.array([np.mean(own) if len(own) else 0.0 for own in losses])
    mean_N = np.maximum(trust_N * measured_N + (1 - trust_N) * expected_N, LEAST_SHARE * expected_N)
    return Estimate(mean_N, np.sqrt((1 - trust_N) * prior_N), error_N)


def look(estimate: Estimate, choose: Choose, images: int, seed: int) -> Look:
    """What the estimate leaves open of the decision, and the regret of deciding by its means."""
    generator = np.random.default_rng(seed)
    decided = sorted(choose(estimate.mean_N.tolist()))
    taken_N, regrets = np.zeros(len(estimate.mean_N)), []
    for _ in range(DRAWS):
        lost_N = estimate.draw(generator)
        best = sorted(choose(lost_N.tolist()))
        taken_N[best] += 1 / DRAWS
        regrets.append(lost_N[decided].sum() - lost_N[best].sum())
    return Look(images, max(0.0, float(np.mean(regrets))), taken_N)


def first_drawn(taken_N: np.ndarray) -> np.ndarray:
    """Which changes the first look draws, as booleans [N], by what the screen leaves open: those that are, and of the
    others the nearest to it, up to AT_FIRST of all."""
    nearest = np.argsort(np.abs(taken_N - 0.5), kind="stable")
    chosen = np.zeros(len(taken_N), dtype=bool)
    chosen[nearest[: max(left_open(taken_N).sum(), math.ceil(AT_FIRST * len(taken_N)))]] = True
    return chosen


@dataclass(frozen=True)
class Race:
    """How a race went: the estimate, every change's losses and PSNR, prompt by prompt, and the looks."""

    labels: tuple[str, ...]
    losses: Sequence[Sequence[float]]
    psnr: Sequence[Sequence[float]]
    others_psnr: float
    estimate: Estimate
    looks: tuple[Look, ...]
    base_P: Tensor

    def rows(self) -> dict[str, dict]:
        """{label: its row of scores.json}: the estimate; what was measured, where that is something; and how often
        the possible decisions take it."""
        found = {}
        columns = zip(self.labels, self.losses, self.psnr, self.estimate.mean_N.tolist(), self.estimate.sd_N.tolist(),
                      self.estimate.error_N.tolist(), self.looks[-1].taken_N.tolist(), strict=True)  # fmt: skip
        for label, losses, decibels, mean, sd, error, taken in columns:
            row = {"delta_clip": mean, "se": sd, "n": len(losses), "picture_error": error, "taken": round(taken, 4)}
            if losses:
                se = mean_and_error(losses).se if len(losses) > 1 else None
                row |= {"psnr": float(np.mean(decibels)), "measured": {"delta_clip": float(np.mean(losses)), "se": se}}
            found[label] = {**row, "per_prompt": list(losses)}
        return found


def run_race(
    drawing: Drawing, labels: Sequence[str], screened_N: Sequence[float], choose: Choose, tolerance: float, seed: int,
    keep: Path | None = None,
) -> Race:  # fmt: skip
    """Draws changes until their decision is settled, or all that are open have been drawn for all prompts.

    screened_N: the errors of a screen. tolerance: the regret at which the decision is settled, in the metric's units.
    Under `keep` every finished look lies as a file.
    """
    labels, errors_N = tuple(labels), np.asarray(screened_N, dtype=float)
    losses: list[list[float]] = [[] for _ in labels]
    decibels: list[list[float]] = [[] for _ in labels]
    looks: list[Look] = []
    base_P = drawing.base(range(len(drawing.texts)), keep and keep / "base")
    racing_N = first_drawn(look(estimated(losses, losses, errors_N), choose, 0, seed).taken_N)
    while True:
        racing = np.flatnonzero(racing_N).tolist()
        place = keep and keep / f"look-{len(looks):03d}"
        values = drawn(drawing, [(labels[n], len(losses[n])) for n in racing], place)
        for n, (lost, psnr) in zip(racing, values.tolist(), strict=True):
            losses[n].append(lost)
            decibels[n].append(psnr)
        others = drawing.others_psnr
        errors = [[none_if_nan(picture_error(psnr, others)) or 0.0 for psnr in own] for own in decibels]
        estimate = estimated(losses, errors, errors_N)
        spent_N = np.array([len(own) for own in losses])
        looks.append(look(estimate, choose, int(spent_N.sum()), seed + len(looks) + 1))
        racing_N = looks[-1].open_N & (spent_N < len(base_P))
        left_open = f"{looks[-1].open_N.sum()} of {len(labels)} changes are open"
        log.info(f"{spent_N.sum()} images: {left_open}, the decision's expected regret is {looks[-1].regret:.2f}")
        if looks[-1].regret <= tolerance or not racing_N.any():
            return Race(labels, losses, decibels, others, estimate, tuple(looks), base_P)


def drawn(drawing: Drawing, pairs: Sequence[tuple[str, int]], place: Path | None) -> Tensor:
    """The values of `Drawing.changes`, from a file where an earlier process left them."""
    file = place and place / "values.safetensors"
    if file and file.exists():
        return load_file(file)["values"]
    values = drawing.changes(pairs, place and place / "changes")
    if file and drawing.shared[1].is_main_process:
        write_tensors(file, {"values": values})
    return values


def why_stopped(race: Race, tolerance: float) -> str:
    if race.looks[-1].regret <= tolerance:
        return f"the expected regret is at most {tolerance:g}"
    if not race.looks[-1].open_N.any():
        return f"no change is open: each is taken in more than {1 - OPEN:.0%} of the draws, or in less than {OPEN:.0%}"
    return "all prompts are spent on the changes that are open"


def record_of(race: Race, tolerance: float, evaluations: int) -> Mapping[str, Any]:
    """What scores.json says of the race beside its rows; evaluations: of the network, for an image. The base's images
    are where the screen's sampling ends, and cost none."""
    prompts, images = len(race.base_P), race.looks[-1].images
    return {
        "images": images,
        "evaluations": prompts * (evaluations + 1 + len(race.labels)) + images * evaluations,
        "tolerance": tolerance,
        "stopped": why_stopped(race, tolerance),
        "looks": [{"images": of.images, "open": int(of.open_N.sum()), "regret": of.regret} for of in race.looks],
    }
