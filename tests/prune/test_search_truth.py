"""What is held against networks after recovery: correlations with it, how far they lie apart, regrets."""

import numpy as np
import pytest

from benchmarks.search_truth import Found, Network, correlations, networks, resamples, row_of
from slimstep.eval.metrics.compare import spearman
from slimstep.prune.evolve import BlockValue

DRAW = np.random.default_rng(0)
TRUTH = DRAW.normal(size=40)
OTHER = DRAW.normal(size=40)


def found(**predictors) -> list[Found]:
    return [
        Found(Network(str(n), (), 0.7), TRUTH[n], 0.1, 20.0, {name: x[n] for name, x in predictors.items()})
        for n in range(len(TRUTH))
    ]


def test_a_predictor_is_set_against_the_first_on_the_same_resamples():
    rows = found(first=OTHER, truth=TRUTH, same=np.exp(OTHER))
    assert row_of("first", rows)["more than the first"] == "–"
    assert row_of("same", rows)["more than the first"] == "+0.00 [+0.00, +0.00]"  # the same ranks in every resample
    exact = row_of("truth", rows)
    assert exact["Spearman with CLIP after recovery"] == "1.00 [1.00, 1.00]"
    assert exact["regret of its choice, CLIP"] == "0.00 [0.00, 0.00]"
    assert exact["more than the first"].startswith("+")


def test_correlations_of_all_resamples_are_those_of_each():
    coarse = np.round(OTHER)  # with ties
    each = [spearman(TRUTH[draw], coarse[draw]) for draw in resamples(len(TRUTH))]
    np.testing.assert_allclose(correlations(TRUTH, coarse), each, atol=1e-12)
    assert np.isnan(correlations(np.array([0.0, 1.0]), np.array([0.0, 1.0]))).any()  # a resample of one value twice


def test_a_regret_is_what_the_choice_lacks_of_the_best():
    wrong = row_of("worst", found(worst=-TRUTH))
    assert wrong["regret of its choice, CLIP"].startswith(f"{TRUTH.max() - TRUTH.min():.2f} ")
    assert wrong["Spearman with CLIP after recovery"] == "-1.00 [-1.00, -1.00]"


@pytest.mark.parametrize("fraction", [0.8, 0.7, 0.5])
def test_networks_differ_and_lie_just_below_the_fraction(fraction):
    values = [BlockValue(f"b{n}", delta_clip=float(DRAW.normal()), saved_ms=1.0, se=0.1) for n in range(20)]
    drawn = networks(values, teacher_ms=25.0, fraction=fraction, count=12)
    assert len({network.removed for network in drawn}) == len(drawn) >= 12
    assert all(fraction - 0.05 <= network.share <= fraction for network in drawn)
