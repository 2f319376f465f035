"""Pairs of changes that lose more, or less, together than the sum of what each loses alone.

Pairs are found, not assumed. Random sets of the changes that a round may take, each with a chance of one half, are
measured: by the error of one prediction (screening.py), which is cheap, or by images. What they lose is regressed on
the changes and, step by step, on the pair of them that explains most of what is left, as long as its interval excludes
zero after Bonferroni's correction for all pairs. (Of an error that is the square of a sum of deviations a pair's term
is twice the product of the two.) Then every pair is measured by images with both changes, against those with one.

Axes: S sets, N changes, K pairs, P prompts.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from slimstep.engine.seeding import seed_of
from slimstep.eval.metrics.compare import CONFIDENCE, mean_and_error
from slimstep.prune.evolve import BlockValue, choose_removals

MARGIN = 2.0  # the changes among which pairs are sought save so many times what the round has to save
SETS_A_CHANGE = 3  # with fewer the changes alone would explain the sets
MOST_PAIRS = 12  # that are measured by images


@dataclass(frozen=True)
class Interaction:
    """What is lost beyond the sum where all changes with these labels are taken: two, or the one that is left of them
    where the other has been taken already."""

    labels: tuple[str, ...]
    lost: float

    def without(self, taken: Iterable[str]) -> "Interaction":
        return Interaction(tuple(label for label in self.labels if label not in set(taken)), self.lost)


@dataclass(frozen=True)
class Found:
    """A pair of columns, and its term in the regression with the interval for all pairs at once."""

    pair: tuple[int, int]
    estimate: float
    se: float
    low: float
    high: float


def beyond_sum(interactions: Iterable[Interaction], taken: Iterable[str]) -> float:
    """What a set of changes loses beyond the sum."""
    taken = set(taken)
    return sum(interaction.lost for interaction in interactions if taken.issuperset(interaction.labels))


def candidates(values: Sequence[BlockValue], excess_ms: float, sets: int) -> list[str]:
    """The labels of the changes that a search may take: the best bargains that save MARGIN times the excess, of those
    that exclude one another the first alone, and no more than `sets` allow."""
    actions = choose_removals(values, MARGIN * excess_ms, 0.0, sets // SETS_A_CHANGE)
    scored = {value.change.label for value in values if not np.isnan(value.delta_clip)}
    return [action.change.label for action in actions if action.change.label in scored]


def random_sets(labels: Sequence[str], count: int, *seed: int | str) -> list[tuple[str, ...]]:
    """At most `count` sets of the labels, each in half of them, none twice."""
    draw = np.random.default_rng(seed_of("interactions", *seed))
    taken_SN = draw.random((count, len(labels))) < 0.5
    return list(dict.fromkeys(tuple(itertools.compress(labels, taken_N)) for taken_N in taken_SN))


def found_pairs(taken_SN: np.ndarray, lost_S: np.ndarray, most: int = MOST_PAIRS) -> list[Found]:
    """The pairs whose term in the regression of what sets lose has an interval that excludes zero, by forward
    selection, the strongest first.

    taken_SN: bool, which changes each set has. All intervals hold together with 95 %. None for too few sets.
    """
    sets, changes = taken_SN.shape
    pairs = list(itertools.combinations(range(changes), 2))
    x_SN = taken_SN - taken_SN.mean(0)  # centred: the product of two of them is nearly uncorrelated with both
    products_SK = np.array([x_SN[:, i] * x_SN[:, j] for i, j in pairs]).reshape(len(pairs), sets).T
    chosen: list[int] = []

    def columns() -> np.ndarray:
        return np.column_stack([np.ones(sets), x_SN, products_SK[:, chosen]])

    def critical(freedom: int) -> float:
        return float(stats.t.ppf(1 - (1 - CONFIDENCE) / len(pairs) / 2, freedom))

    while len(chosen) < min(most, len(pairs)):
        basis, _ = np.linalg.qr(columns())
        freedom = sets - basis.shape[1] - 1
        left_S = lost_S - basis @ (basis.T @ lost_S)
        if freedom < 1 or left_S @ left_S <= 1e-12 * (lost_S @ lost_S):
            break
        left_SK = products_SK - basis @ (basis.T @ products_SK)
        size_K = (left_SK**2).sum(0)
        is_open_K = size_K > 1e-6 * sets  # a pair that never, or always, comes together says nothing
        term_K = np.divide(left_SK.T @ left_S, size_K, out=np.zeros(len(pairs)), where=is_open_K)
        rest_K = np.maximum(left_S @ left_S - term_K**2 * size_K, 1e-12 * (lost_S @ lost_S))
        t_K = np.abs(term_K) * np.sqrt(size_K * freedom / rest_K)
        best = int(np.argmax(t_K))
        if t_K[best] <= critical(freedom):
            break
        chosen.append(best)
    if not chosen:
        return []
    x_SM = columns()
    term_M, freedom = np.linalg.lstsq(x_SM, lost_S, rcond=None)[0], sets - x_SM.shape[1]
    variance = ((lost_S - x_SM @ term_M) ** 2).sum() / freedom
    se_M = np.sqrt(variance * np.diag(np.linalg.pinv(x_SM.T @ x_SM)))
    wide = critical(freedom)
    terms = list(zip(chosen, term_M[-len(chosen) :].tolist(), se_M[-len(chosen) :].tolist(), strict=True))
    return [Found(pairs[k], b, se, b - wide * se, b + wide * se) for k, b, se in terms if abs(b) > wide * se]


def pair_record(labels: tuple[str, str], found: Found, both_P: Sequence[float], alone_2P: Sequence) -> dict[str, Any]:
    """A pair in interactions.json: its term in the regression, and what it loses beyond the sum of both by images.
    `used` says whether the latter's 95 % interval excludes zero."""
    beyond_P = np.asarray(both_P) - np.sum(alone_2P, axis=0)
    mean = mean_and_error(beyond_P.tolist())
    is_clear = abs(mean.mean) > float(stats.t.ppf(0.5 + CONFIDENCE / 2, mean.n - 1)) * mean.se
    regression = {"estimate": found.estimate, "se": found.se, "low": found.low, "high": found.high}
    return {"changes": list(labels), "regression": regression, "lost": mean.mean, "se": mean.se, "n": mean.n,
            "used": bool(is_clear), "per_prompt": beyond_P.tolist()}  # fmt: skip


def interactions_of(record: dict[str, Any]) -> tuple[Interaction, ...]:
    """Those of an interactions.json that searches take."""
    return tuple(Interaction(tuple(pair["changes"]), pair["lost"]) for pair in record["pairs"] if pair["used"])
