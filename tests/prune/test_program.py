"""The laws of the integer program, and of the other budgets of a finished run."""

import itertools
import json
import math
import random
import sys

import numpy as np
import pytest

from slimstep.models.architecture import BlockSpec, nested
from slimstep.prune.budgets import choices, read_first_round
from slimstep.prune.evolve import BlockValue, choose_removals, record_json
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


def test_below_the_target_it_does_nothing():
    now = {"architecture": {}, "target_ms": 10.0, "copyable": ("a",), "round_index": 0, "rounds": 1}
    assert AdditiveProgram()(Situation((value("a", 1.0, 2.0),), latency_ms=9.0, **now)) == []
    assert len(AdditiveProgram()(Situation((value("a", 1.0, 2.0),), latency_ms=11.0, **now))) == 1


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
