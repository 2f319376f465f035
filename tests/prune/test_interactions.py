"""Interactions of changes: planted pairs are found and measured, and where there are none, almost none are found."""

import json

import numpy as np
import pytest

from slimstep.prune.changes import Change
from slimstep.prune.evolve import BlockValue, choose_removals
from slimstep.prune.interactions import (
    MOST_PAIRS,
    Found,
    Interaction,
    beyond_sum,
    candidates,
    found_pairs,
    interactions_of,
    pair_record,
    random_sets,
)
from slimstep.prune.program import program_removals
from tests.prune.test_changes import value
from tests.prune.test_job import run

NAMES = tuple("abcdefghijkl")


def world(seed, planted, sets=96, noise=0.3):
    """Sets, and what they lose: sums of what changes lose alone, planted pairs, and noise."""
    draw = np.random.default_rng(seed)
    alone_N = draw.uniform(0, 1, len(NAMES))
    drawn = random_sets(NAMES, sets, seed)
    taken_SN = np.array([[name in of for name in NAMES] for of in drawn])
    lost_S = taken_SN @ alone_N + noise * draw.standard_normal(len(drawn))
    for (i, j), lost in planted.items():
        lost_S += lost * taken_SN[:, i] * taken_SN[:, j]
    return alone_N, taken_SN, lost_S


@pytest.mark.parametrize("seed", range(8))
def test_planted_pairs_are_found_with_intervals_that_exclude_zero_and_hold_the_truth(seed):
    planted = {(2, 7): 3.0, (0, 1): -2.0, (2, 9): 1.5}
    found = {of.pair: of for of in found_pairs(*world(seed, planted)[1:])}
    assert planted.keys() <= found.keys() and len(found) <= len(planted) + 1
    for pair, lost in planted.items():
        assert found[pair].low < lost < found[pair].high and found[pair].low * found[pair].high > 0
    assert next(iter(found)) == (2, 7)


def test_where_losses_add_up_almost_no_pair_is_found():
    """Of 66 pairs in each of 100 worlds: in about one world of twenty some pair stands out by chance."""
    chance = [len(found_pairs(*world(seed, {}, noise=1.0)[1:])) for seed in range(100)]
    assert sum(count > 0 for count in chance) <= 12 and sum(chance) <= 15
    assert found_pairs(*world(0, {}, noise=0.0)[1:]) == []


def test_without_noise_a_pair_is_what_was_planted():
    (found,) = found_pairs(*world(1, {(3, 4): 2.0}, noise=0.0)[1:])
    assert found.pair == (3, 4) and found.estimate == pytest.approx(2.0)


def test_too_few_sets_find_nothing():
    _, taken_SN, lost_S = world(0, {(0, 1): 9.0})
    assert found_pairs(taken_SN[:10], lost_S[:10]) == []
    assert found_pairs(taken_SN[:4, :1], lost_S[:4]) == [] and found_pairs(np.zeros((1, 0)), np.zeros(1)) == []


def test_no_more_pairs_than_are_measured():
    draw = np.random.default_rng(0)
    planted = {(i, j): float(draw.uniform(2, 4)) for i in range(12) for j in range(i)}
    assert len(found_pairs(*world(0, planted, sets=300)[1:])) <= MOST_PAIRS


def test_a_destructive_pair_is_found_and_avoided():
    """Two blocks, each harmless, together destructive: the random sets tell the program, and greedy takes both."""
    alone_N, taken_SN, lost_S = world(5, {(2, 7): 40.0})
    alone_N[[2, 7]] = 0.01
    values = [value(name, float(lost), 1.0) for name, lost in zip(NAMES, alone_N, strict=True)]
    (found,) = found_pairs(taken_SN, lost_S)
    pair = Interaction(tuple(NAMES[n] for n in found.pair), found.estimate)
    greedy, exact = choose_removals(values, 20.0, 16.0), program_removals(values, 20.0, 16.0, [pair])
    both = {"c", "h"}
    assert both <= {action.block for action in greedy} and len(both & {action.block for action in exact}) == 1


def test_candidates_are_the_best_bargains_that_save_twice_the_excess_and_can_be_taken_together():
    values = [value("a", 4.0, 2.0), value("a:ff@0.5", 0.1, 1.0), value("a:ff@0.25", 0.5, 1.5), value("b", 2.0, 2.0),
              value("c", 9.0, 2.0), BlockValue("d", float("nan"), float("nan"), 5.0, screen_error=0.5)]  # fmt: skip
    assert candidates(values, 1.4, 99) == ["a:ff@0.5", "b"]
    assert candidates(values, 2.0, 99) == ["a:ff@0.5", "b", "c"]
    assert candidates(values, 9.0, 99) == ["a:ff@0.5", "b", "c"]  # d was screened out
    assert candidates(values, 9.0, 6) == ["a:ff@0.5", "b"]  # three sets for each


def test_sets_have_half_of_the_changes_and_are_no_set_twice():
    sets = random_sets(NAMES, 400, 0)
    assert len(sets) == len(set(sets)) and sets == random_sets(NAMES, 400, 0) != random_sets(NAMES, 400, 1)
    assert np.mean([len(of) for of in sets]) == pytest.approx(6, abs=0.3)
    assert len(random_sets("ab", 400, 0)) == 4


def test_a_pair_is_counted_where_images_say_so():
    found = Found((0, 1), 1.0, 0.1, 0.5, 1.5)
    alone = [np.array([1.0, 2.0, 3.0, 2.0]), np.array([0.0, 1.0, 0.5, 0.5])]
    clear = pair_record(("a", "b"), found, (alone[0] + alone[1] + [3.0, 3.1, 2.9, 3.0]).tolist(), alone)
    assert clear["used"] and clear["lost"] == pytest.approx(3.0) and clear["n"] == 4
    noise = pair_record(("c", "d"), found, (alone[0] + alone[1] + [3.0, -3.1, 2.9, -2.0]).tolist(), alone)
    assert not noise["used"]
    (only,) = interactions_of({"pairs": [clear, noise]})
    assert only.labels == ("a", "b") and only.lost == pytest.approx(3.0)
    assert beyond_sum([only], ["a", "b", "c"]) == pytest.approx(3.0) and beyond_sum([only], ["a", "c"]) == 0
    assert beyond_sum([only.without(["a"])], ["b"]) == pytest.approx(3.0)


@pytest.mark.parametrize("by", ["screen", "images"])
def test_the_job_measures_its_sets_and_keeps_what_they_lost(by, tmp_path, tiny_model):
    done = run("+experiment=prune_unet", f"root={tmp_path}", "search=program", "search.rounds=1",
               "search.target_fraction=0.6", "search.interactions=24", f"search.interactions_by={by}",
               *tiny_model)  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    path = tmp_path / "prune_unet"
    record = json.loads((path / "round-00/interactions.json").read_text())
    assert record["protocol"]["by"] == by and len(record["lost"]) == len(record["sets"]) <= 24
    scores = json.loads((path / "round-00/scores.json").read_text())
    assert 1 < len(record["changes"]) <= 8 and {Change.of(label).block for label in record["changes"]} <= set(
        scores["sites"]
    )
    assert "random sets" in done.stderr and "Pairs that lose more or less" in (path / "report.html").read_text()
    assert not (path / "partial").exists()
    planned = run("+experiment=prune_unet", f"root={tmp_path / 'new'}", "search=program", "search.interactions=24",
                  "plan=true", *tiny_model)  # fmt: skip
    assert "24 random sets, and at most 12 pairs by images" in planned.stdout
