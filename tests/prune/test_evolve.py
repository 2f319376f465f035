"""Algorithm 1's decisions on hand-made values."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slimstep.models.architecture import as_architecture, as_json
from slimstep.prune.evolve import BlockValue, apply, choose_copies, choose_removals, record_json, round_target_ms
from slimstep.prune.scores import picture_error
from slimstep.prune.search import (
    EverySecond,
    InOrder,
    Manual,
    MiddleRow,
    RandomRemoval,
    Situation,
    SnapFusionSearch,
)


def value(block, delta_clip, saved_ms):
    return BlockValue(block, delta_clip, se=0.1, saved_ms=saved_ms)


VALUES = (value("a", 4.0, 2.0), value("b", 1.0, 2.0), value("c", 3.0, 1.0), value("d", 0.2, 1.0))


def situation(latency_ms=10.0, target_ms=8.0, round_index=0, rounds=1, values=VALUES, copyable=("a", "b", "c")):
    return Situation(values, {}, latency_ms, target_ms, copyable, round_index, rounds)


def chosen(actions):
    return [action.block for action in actions]


def test_the_worst_bargains_go_first_until_the_target_is_met():
    actions = choose_removals(VALUES, latency_ms=10, target_ms=7.5)
    assert chosen(actions) == ["d", "b"]
    assert actions[-1].predicted_ms == pytest.approx(7.0)


def test_blocks_whose_removal_does_no_harm_go_first_the_slowest_of_them_before_the_others():
    free = (value("x", -0.1, 0.5), value("y", -3.0, 0.2), value("z", 0.0, 0.9))
    assert chosen(choose_removals((*VALUES, *free), latency_ms=10, target_ms=0)) == ["z", "x", "y", "d", "b", "a", "c"]


def seen(block, delta_clip, se, error, saved_ms=1.0):
    """A block whose removal changes the picture so far."""
    return BlockValue(block, delta_clip, se, saved_ms, picture_error=error)


def test_a_block_whose_removal_destroys_the_picture_is_not_free():
    kept, destroyed = seen("kept", -1.0, 2.0, 0.001), seen("destroyed", -9.0, 2.0, 0.6, saved_ms=5.0)
    dear = seen("dear", 8.0, 1.0, 0.02)
    first, second, last = choose_removals([destroyed, dear, kept], latency_ms=10, target_ms=0)
    assert (first.block, second.block, last.block) == ("kept", "destroyed", "dear")  # 8.0 for 5 ms, and for 1 ms
    assert first.why.startswith("free") and "60% of an unrelated one's: taken to lose 8.00" in second.why
    assert last.value == 8.0 and second.delta_clip == -9.0  # what was measured is told as it was


def test_the_less_of_the_picture_is_kept_the_later_it_goes_where_the_scorer_knows_nothing():
    draw = torch.Generator().manual_seed(0)
    errors = [10 ** (-k / 4) for k in range(20)]
    losses = torch.randn(20, generator=draw).tolist()
    blocks = [seen(f"{k}", lost, 1.0, error) for k, (lost, error) in enumerate(zip(losses, errors, strict=True))]
    order = [int(block) for block in chosen(choose_removals(blocks, latency_ms=100, target_ms=0))]
    destroyed = [k for k, error in enumerate(errors) if error >= 0.05]
    assert len(destroyed) == 6 and not set(order[:12]) & set(destroyed)


def test_a_clear_loss_stands_whatever_became_of_the_picture():
    values = [seen("a", 4.0, 1.0, 0.9), seen("b", 5.0, 1.0, 0.001), seen("c", 2.5, 1.0, 0.5)]
    assert chosen(choose_removals(values, latency_ms=10, target_ms=0)) == ["c", "a", "b"]


def test_where_no_picture_was_measured_the_score_decides_alone():
    free, dear = BlockValue("free", -9.0, 2.0, 1.0), seen("dear", 8.0, 1.0, 0.5)
    assert chosen(choose_removals([dear, free], latency_ms=10, target_ms=0)) == ["free", "dear"]


def test_a_block_without_a_clear_loss_is_not_copied_for_its_picture():
    assert chosen(choose_copies([seen("a", -1.0, 2.0, 0.9), seen("b", 1.0, 0.1, 0.1)], 4, 8, ("a", "b"))) == ["b"]


def test_the_second_scorer_changes_nothing_on_the_bundled_model():
    scores = json.loads((Path(__file__).parents[2] / "benchmarks/prune-baselines/block-scores.json").read_text())
    others = 6.9  # dB, of its base images to those of other prompts
    blocks = [
        BlockValue(block, b["delta_clip"], b["se"], 1.0, picture_error=picture_error(b["psnr"], others))
        for block, b in scores["sites"].items()
    ]
    assert sum(block.picture_error >= 0.05 for block in blocks) == 5
    unseen = [replace(block, picture_error=math.nan) for block in blocks]
    assert choose_removals(blocks, 38, 0) == choose_removals(unseen, 38, 0)


def test_a_block_that_saves_no_time_is_never_removed():
    assert choose_removals([value("a", 0.0, 0.0), value("b", -1.0, -0.2)], latency_ms=10, target_ms=5) == []


def test_ties_go_to_the_earlier_block():
    assert chosen(choose_removals([value("b", 1, 1), value("a", 1, 1)], latency_ms=10, target_ms=9)) == ["b"]


def test_a_transformer_and_its_layer_do_not_go_in_one_round():
    layers = [value("up.attentions.0.transformer_blocks.1", 0.1, 1.0), value("up.attentions.0", 0.3, 2.0)]
    assert chosen(choose_removals([*layers, value("up.attentions.01", 9, 1)], latency_ms=10, target_ms=0)) == [
        "up.attentions.0.transformer_blocks.1", "up.attentions.01"]  # fmt: skip


def test_the_most_valuable_block_that_fits_is_copied():
    assert chosen(choose_copies(VALUES, latency_ms=6.5, target_ms=8, copyable=("a", "b", "c"))) == ["c"]
    assert chosen(choose_copies(VALUES, latency_ms=7.5, target_ms=8, copyable=("a", "b", "c"))) == []
    assert chosen(choose_copies(VALUES, latency_ms=4, target_ms=8, copyable=("a",), at_most=3)) == ["a"]
    assert chosen(choose_copies([value("a", -1.0, 1.0)], latency_ms=4, target_ms=8, copyable=("a",))) == []


def test_a_copy_of_a_copied_block_costs_what_one_of_them_takes():
    (action,) = choose_copies([BlockValue("a", 4.0, 0.1, saved_ms=2.0, repeats=2)], 6.5, target_ms=8, copyable=("a",))
    assert action.saved_ms == -1.0 and action.predicted_ms == pytest.approx(7.5)


def test_rounds_share_the_excess_and_the_last_one_meets_the_target():
    assert round_target_ms(10, 4, round_index=0, rounds=3) == pytest.approx(8)
    assert round_target_ms(8, 4, round_index=1, rounds=3) == pytest.approx(6)
    assert round_target_ms(7, 4, round_index=2, rounds=3) == 4


def test_algorithm_1_removes_over_the_target_and_copies_under_it():
    search = SnapFusionSearch()
    assert {action.action for action in search(situation(latency_ms=10))} == {"remove"}
    assert {action.action for action in search(situation(latency_ms=5))} == {"copy"}


def test_a_group_is_at_most_as_large_as_asked_except_in_the_last_round():
    search = SnapFusionSearch(group_size=1)
    assert chosen(search(situation(target_ms=6, rounds=2))) == ["d"]
    assert chosen(search(situation(target_ms=6, rounds=2, round_index=1))) == ["d", "b", "a"]


def test_a_random_removal_depends_on_its_seed_alone_and_meets_the_target():
    first, again = RandomRemoval(seed=1)(situation()), RandomRemoval(seed=1)(situation())
    assert first == again and first[-1].predicted_ms <= 8
    assert len({tuple(chosen(RandomRemoval(seed)(situation()))) for seed in range(20)}) > 1


def test_a_given_order_is_cut_where_the_target_is_met():
    assert chosen(InOrder(["c", "a", "b"])(situation())) == ["c", "a"]


LINE = tuple(value(f"{i}", math.nan, 1.0) for i in range(12))


def removed(search, target_ms, values=LINE):
    return chosen(search(situation(latency_ms=12.0, target_ms=target_ms, values=values)))


@pytest.mark.parametrize("count", range(1, 12))
def test_a_row_in_the_middle_has_no_gap_and_as_much_before_it_as_behind_it(count):
    row = sorted(map(int, removed(MiddleRow(), 12 - count)))
    assert row == [*range(row[0], row[0] + count)] and abs(row[0] - (11 - row[-1])) <= 1


@pytest.mark.parametrize("count", range(1, 7))
def test_of_every_second_block_no_two_are_neighbours_and_they_are_spread_evenly(count):
    gone = sorted(map(int, removed(EverySecond(), 12 - count)))
    assert len(gone) == count and set(gone) <= {1, 3, 5, 7, 9, 11}
    halves = sum(block < 6 for block in gone), sum(block >= 6 for block in gone)
    assert abs(halves[0] - halves[1]) <= 1


def test_a_rule_by_hand_goes_on_until_the_target_is_met():
    for search in (MiddleRow(), EverySecond()):
        assert len(removed(search, 3.0)) == 9 and len(set(removed(search, 0.0))) == 12
        assert removed(search, 0.5, LINE[:1]) == ["0"] and removed(search, 0.5, ()) == []


def test_a_table_by_hand_is_taken_whole_and_says_what_is_unknown():
    actions = Manual(remove=["a"], architecture={"c": 3, "level": 0})(situation())
    assert as_json(apply({}, actions)) == {"a": 0, "c": 3, "level": 0}
    unknown = next(action for action in actions if action.block == "level")
    assert math.isnan(unknown.saved_ms) and record_json(unknown)["saved_ms"] is None


def test_a_table_by_hand_that_is_reached_asks_for_nothing_more():
    first = situation(target_ms=0.1)
    manual = Manual(remove=["a"], architecture={"c": 3})
    assert manual(first.after(manual(first), measured_ms=9.0)) == []


def test_after_a_transformer_its_layers_are_no_longer_there_to_remove():
    layer = "a.attentions.0.transformer_blocks.1"
    values = (value("a.attentions.0", 0.1, 2.0), value(layer, 0.1, 1.0), value("b", 1, 1))
    first = situation(target_ms=0.1, values=values)
    taken = choose_removals(values, 10, 9)
    assert chosen(taken) == ["a.attentions.0"]
    assert [v.block for v in first.after(taken, measured_ms=8.0).values] == ["b"]


def test_a_broken_or_impossible_table_is_named(tmp_path):
    (tmp_path / "architecture.json").write_text("{")
    with pytest.raises(ValueError, match=r"architecture.json.*no JSON table"):
        Manual(architecture=str(tmp_path / "architecture.json"))
    with pytest.raises(ValueError, match=r"gives a repeats='0'"):
        Manual(architecture={"a": "0"})


def test_a_missing_architecture_file_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        Manual(architecture="nowhere.json")


def test_undoing_a_removal_gives_the_table_back():
    actions = choose_removals(VALUES, 10, 8.5)
    assert as_json(apply({}, actions)) == {"d": 0, "b": 0}
    assert as_json(apply(as_architecture({"c": 2}), choose_copies(VALUES, 4, 8, ("c",)))) == {"c": 3}


def test_reasons_name_the_metric_that_blocks_were_ranked_by_and_files_keep_their_fields():
    ours, clip = (BlockValue("a", 3.0, 0.1, 2.0, **more) for more in ({"metric": "psnr"}, {}))
    (action,) = choose_removals([ours], latency_ms=10, target_ms=9)
    assert action.why == "1.50 psnr lost per ms: psnr lost +3.00 ± 0.10, saves 2.00 ms"
    assert replace(ours, delta_clip=-1.0).reason.startswith("free: psnr lost -1.00")
    assert record_json(ours) == record_json(clip)
