"""Comparing two models honestly: per-prompt differences at equal seed, their error, and whether rankings agree.

Prompts differ far more than models do, so the means of two models say little and the mean of the differences says much:
pairing divides the variance by 1 / (1 - r), r the correlation of the two models' scores.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE, RESAMPLES = 0.95, 10_000
AT_ONCE = 2**20  # indices of resamples that are drawn together: 8 MB


@dataclass(frozen=True)
class Mean:
    """A mean over prompts and its standard error."""

    mean: float
    se: float
    n: int


@dataclass(frozen=True)
class PairedRatio:
    """The mean of scores over the mean of reference, and its bootstrap interval."""

    ratio: float
    low: float
    high: float
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
    scores: Sequence[float], reference: Sequence[float], resamples: int = RESAMPLES, seed: int = 0
) -> PairedDifference:
    """How much higher `scores` are than `reference`, prompt by prompt; percentile bootstrap over prompts, seeded.

    Raises ValueError if the two were not measured on equally many prompts.
    """
    scores_2N = paired(scores, reference)
    difference_N = scores_2N[0] - scores_2N[1]
    mean = mean_and_error(difference_N)
    means = [difference_N[draws_RN].mean(-1) for draws_RN in bootstrap(mean.n, resamples, seed)]
    low, high = interval(np.concatenate(means))
    return PairedDifference(mean.mean, mean.se, low, high, mean.n)


def paired_ratio(errors: Sequence[float], reference: Sequence[float]) -> PairedRatio:
    """How large `errors` are on average in units of `reference`'s; prompts are drawn for both at once.

    Raises ValueError if the two were not measured on equally many prompts.
    """
    errors_2N = paired(errors, reference)
    means_2R = [errors_2N[:, draws_RN].mean(-1) for draws_RN in bootstrap(len(errors), RESAMPLES)]
    low, high = interval(np.divide(*np.concatenate(means_2R, axis=1)))
    whole = errors_2N.mean(1)
    return PairedRatio(float(whole[0] / whole[1]), low, high, len(errors))


def relative_to(reference: Mapping[str, Any] | None, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a metric measured of a point, with its paired difference to the reference's; of kind per_prompt, and of what
    is compared by ratio, also the ratio to it. Both are None without a reference, with one of other prompts or seeds,
    and a ratio to 0."""
    kind = measured["kind"]
    if kind not in ("per_image", "per_prompt"):
        return dict(measured)
    if reference and kind == "per_prompt" and any(reference[key] != measured[key] for key in ("n", "seeds")):
        reference = None
    both = reference and (measured["per_prompt"], reference["per_prompt"])
    relative = {"versus_reference": asdict(paired_difference(*both)) if both else None}
    if kind == "per_prompt" or measured.get("compared_by_ratio"):
        relative["ratio_to_reference"] = asdict(paired_ratio(*both)) if both and any(both[1]) else None
    return {**measured, **relative}


def paired(scores: Sequence[float], reference: Sequence[float]) -> np.ndarray:
    if len(scores) != len(reference):
        raise ValueError(f"{len(scores)} scores cannot be paired with {len(reference)}; use the same prompts for both")
    return np.asarray([scores, reference], dtype=np.float64)


def bootstrap(size: int, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Resamples of N = `size` prompts, as indices [R, N]; many at once, the same however many."""
    draw, rows = np.random.default_rng(seed), max(1, AT_ONCE // size)
    return (draw.integers(size, size=(min(rows, resamples - done), size)) for done in range(0, resamples, rows))


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


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
    losses = np.asarray(losses_SN, dtype=np.float64)
    return spearman(losses[:, 0::2].mean(1), losses[:, 1::2].mean(1))
