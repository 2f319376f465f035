"""A race of changes: prompts are spent only where they may still change what is decided.

Every change is drawn for a few prompts. Then, until the decision is settled, those are drawn for a few more that are
taken in some and left in others of the decisions that the estimates allow. Two things make few prompts enough:

- The estimate of what a change loses is pooled over all changes (`pooled`). How far pictures move says much of what is
  lost, and says it after two prompts: losses are shrunk towards their isotonic regression on the pictures' error, and
  so are their variances.
- The decision is settled where its regret is small: what it is expected to lose more than the best one, over draws from
  the estimates. Blocks that lose the same to within this need no order.

Axes: N changes, P prompts, S draws.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from scipy.optimize import isotonic_regression
from scipy.special import digamma
from torch import Tensor

from slimstep.engine.files import write_tensors
from slimstep.prune.scores import Drawing, block_record, none_if_nan, picture_error

log = logging.getLogger("slimstep")

DRAWS, OPEN = 100, 0.05  # decisions that are drawn; a change is open where it is taken in more and in less than so many
SPREAD = 1.0  # of a loss around its regression, in units of it: with less, few prompts are believed too much
FEW = 4.0  # degrees of freedom that the pooled variance counts for

Choose = Callable[[Sequence[float]], set[int]]  # the places of the changes that a search takes, by what each loses


@dataclass(frozen=True)
class Estimate:
    """What changes lose, as far as is known: mean and standard deviation, of shape [N]."""

    mean_N: np.ndarray
    sd_N: np.ndarray


@dataclass(frozen=True)
class Look:
    """What was known at a moment of a race. taken_N: in what share of the draws each change is taken."""

    images: int
    regret: float
    taken_N: np.ndarray

    @property
    def open_N(self) -> np.ndarray:
        return (self.taken_N > OPEN) & (self.taken_N < 1 - OPEN)


def pooled(losses: Sequence[np.ndarray], errors_N: np.ndarray, least: float) -> Estimate:
    """The estimate from the losses of every change, on two prompts or more each, and the errors of its pictures.

    A loss is normal around f(error), its isotonic regression, not below 0, with a standard deviation of SPREAD · f and
    of `least`. The variance of its prompts is the change's own, with FEW degrees of freedom at a power law of the error
    that all changes share. (Empirical Bayes: Morris 1983; for variances Smyth 2004, eq. 2.)
    """
    count_N = np.array([len(loss_P) for loss_P in losses], dtype=float)
    mean_N = np.array([loss_P.mean() for loss_P in losses])
    own_N = np.array([loss_P.var(ddof=1) for loss_P in losses])
    variance_N = (FEW * power_law(own_N, errors_N, count_N - 1, least) + (count_N - 1) * own_N) / (FEW + count_N - 1)
    noise_N = variance_N / count_N
    order = np.argsort(errors_N, kind="stable")
    expected_N = np.empty_like(mean_N)
    expected_N[order] = np.maximum(isotonic_regression(mean_N[order], weights=1 / noise_N[order]).x, 0)
    prior_N = (SPREAD * expected_N) ** 2 + least**2
    weight_N = prior_N / (prior_N + noise_N)
    return Estimate(weight_N * mean_N + (1 - weight_N) * expected_N, np.sqrt(weight_N * noise_N))


def power_law(variances_N: np.ndarray, errors_N: np.ndarray, freedom_N: np.ndarray, least: float) -> np.ndarray:
    """exp(a + b·log error), fitted to the logarithms of the variances; none is below `least`²."""
    floor = least**2
    x, y = np.log(np.maximum(errors_N, 1e-6)), np.log(variances_N + floor)
    if np.ptp(x) == 0:
        return np.full_like(x, max(np.average(variances_N, weights=freedom_N), floor))
    y -= digamma(freedom_N / 2) - np.log(freedom_N / 2)  # E[log χ²_k / k]: logarithms of few prompts' are too low
    fitted = np.polyval(np.polyfit(x, y, 1, w=np.sqrt(freedom_N)), x)
    return np.maximum(np.exp(fitted), floor)


def look(estimate: Estimate, choose: Choose, images: int, seed: int) -> Look:
    """What the estimate leaves open of the decision, and the regret of deciding by its means."""
    draw = np.random.default_rng(seed)
    decided = sorted(choose(estimate.mean_N.tolist()))
    taken_N, regrets = np.zeros(len(estimate.mean_N)), []
    for _ in range(DRAWS):
        lost_N = estimate.mean_N + estimate.sd_N * draw.standard_normal(len(taken_N))
        best = sorted(choose(lost_N.tolist()))
        taken_N[best] += 1 / DRAWS
        price_N = np.maximum(lost_N, 0)
        regrets.append(price_N[decided].sum() - price_N[best].sum())
    return Look(images, max(0.0, float(np.mean(regrets))), taken_N)


@dataclass(frozen=True)
class Race:
    """How a race went: the estimate, every change's losses and PSNR, and the looks."""

    labels: tuple[str, ...]
    losses: tuple[np.ndarray, ...]
    psnr_N: np.ndarray
    others_psnr: float
    estimate: Estimate
    looks: tuple[Look, ...]
    base_P: Tensor

    def rows(self) -> dict[str, dict]:
        """{label: its row of scores.json}: the pooled estimate, what was measured, and where the decision left it."""
        found = {}
        columns = zip(self.labels, self.losses, self.psnr_N, self.estimate.mean_N, self.estimate.sd_N,
                      self.looks[-1].taken_N, strict=True)  # fmt: skip
        for label, loss_P, mean_psnr, mean, sd, taken in columns:
            row = block_record(loss_P.tolist(), float(mean_psnr), self.others_psnr)
            measured = {"delta_clip": row["delta_clip"], "se": row["se"]}
            found[label] = {**row, "delta_clip": float(mean), "se": float(sd), "measured": measured,
                            "taken": round(float(taken), 4)}  # fmt: skip
        return found


def run_race(
    drawing: Drawing, labels: Sequence[str], choose: Choose, prompts: Sequence[int], chunk: int, tolerance: float,
    seed: int, keep: Path | None = None,
) -> Race:  # fmt: skip
    """Draws changes until their decision is settled, or all have been drawn for all `prompts`.

    prompts: numbers in the drawing's set, in the order in which they are spent, `chunk` at a time. tolerance: the
    regret at which the decision is settled, in the metric's units. Under `keep` every finished look lies as a file.
    """
    labels = tuple(labels)
    spent_N = np.zeros(len(labels), dtype=int)
    losses: list[list[float]] = [[] for _ in labels]
    decibels: list[list[float]] = [[] for _ in labels]
    looks: list[Look] = []
    racing_N = np.ones(len(labels), dtype=bool)
    while True:
        pairs = [(n, spent_N[n] + k) for n in np.flatnonzero(racing_N) for k in range(chunk)
                 if spent_N[n] + k < len(prompts)]  # fmt: skip
        place = keep and keep / f"look-{len(looks):03d}"
        drawing.base([prompts[k] for k in range(max(k for _, k in pairs) + 1)], place and place / "base")
        values = drawn(drawing, [(labels[n], prompts[k]) for n, k in pairs], place)
        for (n, _), (lost, mean_psnr) in zip(pairs, values.tolist(), strict=True):
            losses[n].append(lost)
            decibels[n].append(mean_psnr)
            spent_N[n] += 1
        others, psnr_N = drawing.others_psnr, np.array([np.mean(own) for own in decibels])
        errors_N = np.array([none_if_nan(picture_error(own, others)) or 0.0 for own in psnr_N])
        own_losses = tuple(map(np.array, losses))
        estimate = pooled(own_losses, errors_N, tolerance / 2)
        images = int(spent_N.sum()) + len(drawing.images)
        looks.append(look(estimate, choose, images, seed + len(looks)))
        racing_N = looks[-1].open_N & (spent_N < len(prompts))
        left_open = f"{looks[-1].open_N.sum()} of {len(labels)} changes are open"
        log.info(f"{images} images: {left_open}, the decision's expected regret is {looks[-1].regret:.2f}")
        if looks[-1].regret <= tolerance or not racing_N.any():
            base_P = drawing.base(sorted(drawing.images))
            return Race(labels, own_losses, psnr_N, others, estimate, tuple(looks), base_P)


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


def record_of(race: Race, tolerance: float, evaluations: int) -> Mapping[str, object]:
    """What scores.json says of the race beside its rows; evaluations: of the network, for an image."""
    images = race.looks[-1].images
    return {
        "images": images,
        "evaluations": images * evaluations,
        "tolerance": tolerance,
        "stopped": why_stopped(race, tolerance),
        "looks": [{"images": of.images, "open": int(of.open_N.sum()), "regret": of.regret} for of in race.looks],
    }
