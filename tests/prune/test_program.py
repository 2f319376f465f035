"""The laws of the integer program, and of the other budgets of a finished run."""

import itertools
import json
import math
import random
import sys

import numpy as np
import pytest

from benchmarks import search_budgets
from slimstep.models.architecture import BlockSpec, nested
from slimstep.prune.budgets import Measured, choices, read_first_round
from slimstep.prune.evolve import BlockValue, choose_removals, record_json
from slimstep.prune.interactions import Interaction, beyond_sum
from slimstep.prune.program import AdditiveProgram, cheapest_cover, program_removals
from slimstep.prune.search import Manual, Situation
from tests.jobs import run_job
from tests.prune.test_job import SMALL


def value(block, lost, saved_ms, **more):
    return BlockValue(block, lost, 0.1, saved_ms, **more)


def lost(actions):
    return sum(action.delta_clip for action in actions)


def test_it_finds_the_set_that_the_best_bargains_first_miss():
    """10 ms are too much: `small` is the better bargain per millisecond, and `large` alone is enough."""
    values = [value("small", 0.8, 1.0), value("large", 9.0, 10.0)]
    greedy, exact = (choose(values, 20.0, 10.0) for choose in (choose_removals, program_removals))
    assert [action.block for action in greedy] == ["small", "large"]
    assert [action.block for action in exact] == ["large"] and exact[0].predicted_ms == 10.0


@pytest.mark.parametrize("seed", range(12))
def test_no_set_is_cheaper_and_nothing_lies_within_what_is_chosen(seed):
    draw = random.Random(seed)
    names = ["a", "a.attn", "a.ff", "b", "b.attn", "c", "d", "e", "f", "g"]
    values = [value(name, draw.uniform(-1, 5), draw.uniform(-0.2, 3)) for name in names]
    excess = draw.uniform(0.1, 0.7) * sum(max(v.saved_ms, 0) for v in values if "." not in v.block)
    chosen = cheapest_cover([v for v in values if v.saved_ms > 0], excess)

    def price(some):
        return sum(max(v.delta_clip, 0) for v in some)

    def fits(some):
        apart = not any(nested(x.block, y.block) for x, y in itertools.combinations(some, 2))
        return apart and sum(v.saved_ms for v in some) >= excess

    sets = itertools.chain.from_iterable(itertools.combinations(values, k) for k in range(len(values) + 1))
    assert fits(chosen) and price(chosen) == pytest.approx(min(map(price, filter(fits, sets))), abs=1e-4)


def test_budgets_compare_greedy_removal_of_whole_blocks_with_the_program_over_all_changes():
    values = (value("a", 4.0, 5.0), value("a", 0.5, 4.0, part="ff", share=0.5), value("b", 3.0, 4.0))
    chosen = search_budgets.chosen(Measured(values, {}, 20.0, {}, "drop_skip"), 0.8)
    labels = {search: [action.change.label for action in made.actions] for search, made in chosen.items()}
    assert labels == {"snapfusion": ["b"], "program": ["a:ff@0.5"]}


def test_what_cannot_meet_the_target_goes_as_far_as_it_can():
    values = [value("a", 1.0, 2.0), value("b", 2.0, 3.0), value("c", 0.1, -1.0)]
    assert sorted(action.block for action in program_removals(values, 20.0, 10.0)) == ["a", "b"]


def test_a_removal_that_loses_less_than_nothing_is_no_gain():
    """Of two blocks that lose nothing one suffices; the second is not removed for its score."""
    values = [value("a", -3.0, 5.0), value("b", -0.1, 5.0)]
    assert len(program_removals(values, 20.0, 15.0)) == 1


def test_what_destroys_the_picture_is_dear_and_what_was_screened_out_goes_last():
    destroyed, gentle = value("a", -9.0, 5.0, picture_error=0.9), value("b", 4.0, 5.0, picture_error=0.01)
    assert [action.block for action in program_removals([destroyed, gentle], 20.0, 15.0)] == ["b"]
    unscored = BlockValue("c", math.nan, math.nan, 5.0, screen_error=0.5)
    assert [action.block for action in program_removals([unscored, gentle], 20.0, 15.0)] == ["b"]
    assert [action.block for action in program_removals([unscored, gentle], 20.0, 10.0)] == ["b", "c"]


@pytest.mark.parametrize("seed", range(8))
def test_with_pairs_no_set_is_cheaper(seed):
    """Of all sets of seven changes, with pairs that lose more and pairs that lose less than their sum."""
    draw = random.Random(seed)
    values = [value(name, draw.uniform(-1, 5), draw.uniform(0.2, 3)) for name in "abcdefg"]
    pairs = [Interaction(pair, draw.uniform(-2, 6)) for pair in draw.sample([*itertools.combinations("abcdefg", 2)], 9)]
    pairs.append(Interaction(("c",), 1.5))  # its partner was taken before
    excess = draw.uniform(1, 8)

    def total(some):
        return max(sum(max(v.delta_clip, 0) for v in some) + beyond_sum(pairs, [v.block for v in some]), 0)

    sets = itertools.chain.from_iterable(itertools.combinations(values, k) for k in range(8))
    possible = [some for some in sets if sum(v.saved_ms for v in some) >= excess]
    chosen = cheapest_cover(values, excess, pairs)
    assert sum(v.saved_ms for v in chosen) >= excess - 1e-6
    assert total(chosen) == pytest.approx(min(map(total, possible)), abs=0.02)


def test_it_avoids_a_pair_that_is_destructive_together_and_greedy_does_not():
    values = [value("a", 0.1, 2.0), value("b", 0.2, 2.0), value("c", 1.0, 2.0)]
    pair = Interaction(("a", "b"), 40.0)
    greedy, exact = choose_removals(values, 20.0, 16.0), program_removals(values, 20.0, 16.0, [pair])
    assert {action.block for action in greedy} == {"a", "b"} and {action.block for action in exact} == {"a", "c"}
    assert {action.block for action in program_removals(values, 20.0, 16.0)} == {"a", "b"}


def now(values, latency_ms, **more):
    return Situation(tuple(values), **{"architecture": {}, "target_ms": 10.0, "copyable": tuple("abc"),
                                       "round_index": 0, "rounds": 1, **more}, latency_ms=latency_ms)  # fmt: skip


def test_copies_are_the_most_worth_that_fits():
    """The best bargain alone leaves room that two others would fill with more; a block that loses nothing, one that
    cannot be copied and one that does not fit are never copied, and no block twice."""
    values = [value("a", 5.0, 2.0), value("b", 3.0, 1.5), value("c", 3.1, 1.5), value("d", 99.0, 1.0)]
    actions = AdditiveProgram()(now(values, 7.0))
    assert [(action.action, action.block) for action in actions] == [("copy", "c"), ("copy", "b")]
    assert actions[-1].predicted_ms == pytest.approx(10.0)
    for others in ([value("a", -1.0, 2.0)], [value("a", 0.0, 2.0)], [value("a", 9.0, 4.0)], [value("d", 9.0, 1.0)]):
        assert AdditiveProgram()(now(others, 7.0)) == []
    assert len(AdditiveProgram()(now([value("a", 5.0, 0.5)], 7.0))) == 1


def test_copies_take_their_share_of_the_room_and_none_without_a_target():
    values = [value("a", 5.0, 2.0), value("b", 3.0, 2.0)]
    assert len(AdditiveProgram()(now(values, 5.0))) == 2
    assert len(AdditiveProgram()(now(values, 5.0, rounds=2))) == 1  # 2.5 of the 5 ms
    assert AdditiveProgram()(now(values, 5.0, target_ms=math.inf)) == []
    assert AdditiveProgram()(now(values, 5.0, copyable=())) == []


def test_removals_never_pay_for_copies():
    """A network that meets its target exactly: were a copy worth what its block's removal loses, in one sum with the
    removals, the best of all sets would remove two of the five blocks for copies of two others. The program leaves it
    alone, and over the target it only removes."""
    values = [value(name, lost, 1.0) for name, lost in zip("abcde", [1.0, 2.0, 3.0, 20.0, 30.0], strict=True)]
    lost = [v.delta_clip for v in values]
    within = (done for done in itertools.product((-1, 0, 1), repeat=5) if sum(done) <= 0)  # 1 ms for each
    best = max(within, key=lambda done: np.dot(done, lost))
    assert best == (-1, -1, 0, 1, 1)
    every = tuple("abcde")
    assert AdditiveProgram()(now(values, 10.0, copyable=every)) == []
    assert [action.action for action in AdditiveProgram()(now(values, 10.5, copyable=every))] == ["remove"]


@pytest.fixture
def finished(tmp_path):
    """The files of a run's first round."""
    folder = tmp_path / "run/round-00"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    given = {"small": (0.8, 1.0), "large": (9.0, 10.0), "free": (-0.5, 2.0)}
    sites = {name: {"per_prompt": (loss + draw.normal(size=8)).tolist()} for name, (loss, _) in given.items()}
    values = [record_json(value(name, *numbers)) for name, numbers in given.items()]
    decision = {"values": values, "before": {}, "bypass": "drop_skip"}
    files = {"decision": decision, "scores": {"sites": sites}, "latency": {"full_ms": 20.0}}
    for name, record in files.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder.parent


def test_other_budgets_of_a_run_are_what_the_searches_choose_for_them(finished):
    measured = read_first_round(finished)
    greedy, exact = choices(measured, [0.5])
    assert [action.block for action in greedy.actions] == ["free", "small", "large"]
    assert [action.block for action in exact.actions] == ["large"]
    assert (greedy.share, exact.share) == (7 / 20, 0.5) and exact.is_reached
    sums = measured.lost["free"] + measured.lost["small"] + measured.lost["large"]
    assert greedy.lost.mean == pytest.approx(sums.mean())
    assert greedy.lost.se == pytest.approx(sums.std(ddof=1) / 8**0.5)
    assert not any(choice.is_reached for choice in choices(measured, [0.3]))


def test_other_budgets_count_the_pairs_that_the_run_measured(finished):
    """`small` and `free` lose 30 together: the program takes `large`, and the sum of Algorithm 1's set has the 30."""
    before = choices(read_first_round(finished), [0.85])
    pair = {"changes": ["free", "small"], "lost": 30.0, "used": True, "per_prompt": [30.0] * 8}
    unclear = {"changes": ["free", "large"], "lost": 99.0, "used": False, "per_prompt": [99.0] * 8}
    (finished / "round-00/interactions.json").write_text(json.dumps({"pairs": [pair, unclear]}))
    greedy, exact = choices(read_first_round(finished), [0.85])
    assert [{action.block for action in choice.actions} for choice in before] == [{"free", "small"}] * 2
    assert {action.block for action in greedy.actions} == {"free", "small"}
    assert greedy.lost.mean == pytest.approx(before[0].lost.mean + 30)
    assert [action.block for action in exact.actions] == ["large"]


def command(monkeypatch, capsys, *words):
    from slimstep.commands import budgets

    monkeypatch.setattr(sys, "argv", ["slimstep budgets", *map(str, words)])
    return budgets.main(), *capsys.readouterr()


def test_the_network_of_a_budget_is_a_file_that_the_next_run_takes(finished, tmp_path, monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, finished, "--fractions", 0.9, 0.5, "--write", tmp_path / "kept.json")
    assert code == 0 and "snapfusion" in out and "program" in out and out.splitlines()[-1].endswith("kept.json")
    kept = Manual(architecture=str(tmp_path / "kept.json"))
    assert kept.architecture == {"large": BlockSpec(0)} and kept.skip_rule == "drop_skip"


def test_a_run_without_scores_and_a_share_that_is_none_are_named(finished, monkeypatch, capsys):
    code, _, said = command(monkeypatch, capsys, finished, "--fractions", 1.5)
    assert code == 1 and "--fractions 1.5: each must lie between 0 and 1" in said
    (finished / "round-00/scores.json").unlink()
    code, _, said = command(monkeypatch, capsys, finished)
    assert code == 1 and said.startswith("error: ") and "scores.json is not there: name a run of prune_unet" in said


@pytest.mark.slow
def test_the_job_removes_what_the_program_chooses(tmp_path, tiny_model):
    done = run_job("+experiment=prune_unet", "name=exact", f"root={tmp_path}", *SMALL, *tiny_model, "search=program",
                   "search.rounds=1")  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    measured = read_first_round(tmp_path / "exact")
    decision = json.loads((tmp_path / "exact/round-00/decision.json").read_text())
    first = program_removals(measured.values, measured.teacher_ms, decision["target_ms"])
    assert [action["site"] for action in decision["actions"]][: len(first)] == [action.block for action in first]
