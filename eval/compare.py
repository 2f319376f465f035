"""Comparing two models honestly: per-prompt differences at equal seed, their error, and whether rankings agree.

Prompts differ far more than models do, so the means of two models say little and the mean of the differences says much:
pairing divides the variance by 1 / (1 - r), r the correlation of the two models' scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Mean:
    """A mean over prompts and its standard error."""

    mean: float
    se: float
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """The mean of (scores - reference) over prompts, its standard error, and its bootstrap interval."""

    mean: float
    se: float
    low: float
    high: float
    n: int


def mean_and_error(scores: Sequence[float]) -> Mean:
    """The mean and its standard error, s / sqrt(n). Raises ValueError for fewer than two scores."""
    scores_N = np.asarray(scores, dtype=np.float64)
    if scores_N.ndim != 1 or len(scores_N) < 2:
        raise ValueError(f"a standard error needs two or more scores in a row, not shape {scores_N.shape}")
    return Mean(float(scores_N.mean()), float(scores_N.std(ddof=1) / len(scores_N) ** 0.5), len(scores_N))


def paired_difference(
    scores: Sequence[float],
    reference: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """How much higher `scores` are than `reference`, prompt by prompt; percentile bootstrap over prompts, seeded.

    Raises ValueError if the two were not measured on equally many prompts.
    """
    if len(scores) != len(reference):
        raise ValueError(f"{len(scores)} scores cannot be paired with {len(reference)}; use the same prompts for both")
    difference_N = np.asarray(scores, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    mean = mean_and_error(difference_N)
    draw = np.random.default_rng(seed)
    means = [difference_N[draw.integers(mean.n, size=mean.n)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return PairedDifference(mean.mean, mean.se, float(low), float(high), mean.n)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; ties share their mean rank. Raises ValueError where a ranking is undefined."""
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"rankings of {len(a)} and {len(b)} values cannot be compared; both need the same two or more")
    if len(set(a)) == 1 or len(set(b)) == 1:
        raise ValueError("values that are all equal have no ranking; measure on more prompts")
    return float(stats.spearmanr(a, b).statistic)


def split_half_agreement(losses_SN: Sequence[Sequence[float]]) -> float:
    """Spearman's correlation of S blocks' mean losses on the even prompts with those on the odd prompts.

    Near 1, the ranking is a property of the blocks; near 0, of the prompts it was measured on.
    """
    losses_SN = np.asarray(losses_SN, dtype=np.float64)
    return spearman(losses_SN[:, 0::2].mean(1), losses_SN[:, 1::2].mean(1))
