"""Paired statistics, against cases worked by hand."""

import numpy as np
import pytest

from slimstep.eval.metrics import compare
from slimstep.eval.metrics.compare import (
    Mean,
    mean_and_error,
    paired_difference,
    paired_ratio,
    spearman,
    split_half_agreement,
)


def test_the_standard_error_by_hand():
    assert mean_and_error([1.0, 2.0, 3.0, 4.0]) == Mean(2.5, pytest.approx((5 / 3) ** 0.5 / 2), 4)


def test_a_constant_gain_is_certain_however_different_the_prompts():
    reference = np.random.default_rng(0).normal(30, 10, size=50)
    gain = paired_difference(reference + 0.25, reference)
    assert gain.mean == pytest.approx(0.25) and gain.n == 50
    assert gain.se == pytest.approx(0, abs=1e-12)
    assert gain.low == pytest.approx(0.25) and gain.high == pytest.approx(0.25)


def test_a_model_compared_with_itself_differs_by_nothing():
    scores = [3.0, 1.0, 2.0]
    same = paired_difference(scores, scores)
    assert (same.mean, same.se, same.low, same.high) == (0, 0, 0, 0)


def test_the_bootstrap_interval_is_the_normal_one_for_many_prompts():
    draw = np.random.default_rng(1)
    difference = paired_difference(draw.normal(0.5, 1, size=2000), np.zeros(2000), resamples=4000)
    assert difference.low == pytest.approx(difference.mean - 1.96 * difference.se, abs=0.1 * difference.se)
    assert difference.high == pytest.approx(difference.mean + 1.96 * difference.se, abs=0.1 * difference.se)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        interval = paired_difference(draw.normal(1, 2, size=60), np.zeros(60), resamples=300)
        covered += interval.low <= 1 <= interval.high
    assert 0.89 <= covered / 200 <= 0.99


def test_resamples_are_the_same_however_many_are_drawn_at_once(monkeypatch):
    draw = np.random.default_rng(3)
    one_by_one = np.stack([draw.integers(7, size=7) for _ in range(20)])
    for at_once in (1, 7, 45, 2**20):
        monkeypatch.setattr(compare, "AT_ONCE", at_once)
        assert np.array_equal(np.concatenate([*compare.bootstrap(7, 20, seed=3)]), one_by_one)


def test_the_interval_is_a_function_of_the_seed():
    scores, reference = np.random.default_rng(4).normal(size=(2, 30))
    assert paired_difference(scores, reference, seed=3) == paired_difference(scores, reference, seed=3)
    assert paired_difference(scores, reference, seed=3) != paired_difference(scores, reference, seed=4)


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))


def test_halves_agree_on_blocks_and_not_on_noise():
    draw = np.random.default_rng(3)
    noise = draw.normal(size=(38, 64))
    assert split_half_agreement(noise + np.arange(38)[:, None]) > 0.95
    assert abs(split_half_agreement(noise)) < 0.5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mean_and_error([1.0]), "two or more scores"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "2 scores cannot be paired with 1"),
        (lambda: spearman([1, 1, 1], [1, 2, 3]), "all equal"),
        (lambda: spearman([1, 2], [1, 2, 3]), "rankings of 2 and 3"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_errors_that_are_half_of_others_are_half_with_certainty():
    reference = np.random.default_rng(6).uniform(1, 9, size=40)
    half = paired_ratio(reference / 2, reference)
    assert half.ratio == pytest.approx(0.5) and half.low == pytest.approx(0.5) and half.high == pytest.approx(0.5)
    noisy = paired_ratio(reference[::-1], reference)
    assert noisy.ratio == pytest.approx(1) and noisy.low < 1 < noisy.high
