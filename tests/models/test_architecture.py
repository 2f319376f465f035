"""The rule of an architecture: what its table says of every block, and how it is read and written."""

import pytest

from slimstep.models.architecture import (
    BlockSpec,
    as_architecture,
    as_json,
    canonical,
    holder_of,
    instances,
    level_of,
    nested,
    num_levels,
    remove,
    repeat,
    repeats_of,
    unet_levels,
    without_defaults,
)

LAYER = "down_blocks.1.attentions.0.transformer_blocks.4"
BLOCKS = (
    "down_blocks.0.resnets.0",
    "down_blocks.1.attentions.0",
    LAYER,
    "mid_block.resnets.0",
    "up_blocks.0.resnets.0",
)


@pytest.mark.parametrize(
    ("table", "block", "repeats"),
    [
        ({}, "mid_block.resnets.0", 1),
        ({"mid_block.resnets.0": 0}, "mid_block.resnets.0", 0),
        ({"mid_block.attentions.0": 3}, "mid_block.attentions.0", 3),
        ({"down_blocks.1.attentions.0": 0}, LAYER, 0),
        ({"down_blocks.1.attentions.0": 0}, "down_blocks.1.attentions.01", 1),
        ({"down_blocks.3": 0}, "down_blocks.3.resnets.1", 0),  # with its way up and the middle
        ({"down_blocks.3": 0}, "up_blocks.0.resnets.2", 0),
        ({"down_blocks.3": 0}, "mid_block.attentions.0", 0),
        ({"down_blocks.3": 0}, "up_blocks.1.resnets.0", 1),
    ],
)
def test_a_block_runs_as_often_as_it_says_unless_what_holds_it_is_removed(table, block, repeats):
    assert repeats_of(block, as_architecture(table), unet_levels(4)) == repeats


def test_paths_tell_which_block_holds_which():
    assert nested(LAYER, "down_blocks.1.attentions.0") and nested("down_blocks.1.attentions.0", LAYER)
    assert not nested(LAYER, LAYER) and not nested("a.attentions.1", "a.attentions.10")
    assert [holder_of(block, BLOCKS) for block in BLOCKS] == [None, None, "down_blocks.1.attentions.0", None, None]
    assert num_levels(BLOCKS) == 2 and [level_of(block, 2) for block in BLOCKS] == [0, 1, 1, 2, 1]


def test_a_layer_has_a_twin_in_every_copy_of_its_transformer():
    holder = holder_of(LAYER, BLOCKS)
    table = as_architecture({holder: 3, LAYER: 2})
    twins = [f"{holder}.copies.{k}.transformer_blocks.4" for k in (0, 1)]
    assert list(instances(LAYER, table, holder)) == [LAYER, *twins]
    assert list(instances(holder, table, None)) == [holder]


def test_a_table_comes_back_from_its_json_and_plain_repeats_are_ints():
    table = {"a": 0, "b": 2, "c": BlockSpec(3)}
    assert as_architecture(as_json(as_architecture(table))) == as_architecture(table)
    assert as_json(as_architecture(table)) == {"a": 0, "b": 2, "c": 3}
    assert as_json({"a": BlockSpec(2, widths={"ff": 0.5})}) == {"a": {"repeats": 2, "widths": {"ff": 0.5}}}
    assert as_architecture({"a": {"repeats": 2}}) == {"a": BlockSpec(2)}


def test_repeating_a_removed_block_puts_it_back():
    table = repeat(remove({}, "a"), "a")
    assert table == {"a": BlockSpec()} and without_defaults(table) == {}
    assert repeat({"b": BlockSpec(2)}, "b") == {"b": BlockSpec(3)}


def test_the_canonical_table_is_in_order_and_says_nothing_twice():
    table = as_architecture({"up_blocks.0.resnets.0": 2, LAYER: 2, "mid_block.resnets.0": 1, BLOCKS[1]: 0})
    assert list(canonical(table, BLOCKS).items()) == [(BLOCKS[1], BlockSpec(0)), (BLOCKS[4], BlockSpec(2))]
    assert canonical(as_architecture({"down_blocks.1": 0, LAYER: 0, BLOCKS[3]: 0}), BLOCKS, unet_levels(2)) == {
        "down_blocks.1": BlockSpec(0)
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (-1, "gives a repeats=-1; 0 removes, 1 keeps, 2 to 256 repeat a block"),
        (True, "gives a repeats=True"),
        ("2", "gives a repeats='2'"),
        (257, "gives a repeats=257"),
        ({"repeat": 2}, r"gives a unknown fields \['repeat'\]; a block has \('repeats', 'widths', 'dtype', 'merge'\)"),
        ({"widths": {"ff": 1.5}}, r"gives a widths={'ff': 1.5}; widths are {part: share from"),
        ({"merge": 0.8}, "gives a merge=0.8; .*merge a share up to 0.75"),
        ({"merge": True}, "gives a merge=True; "),
        ({"dtype": 8}, r"gives a dtype=8; .*dtype is one of \('int8', 'fp8'\)"),
        ({"dtype": "int4"}, "gives a dtype='int4'; "),
    ],
)
def test_what_no_network_is_built_with_is_refused_in_one_line(entry, message):
    with pytest.raises(ValueError, match=message) as caught:
        as_architecture({"a": entry})
    assert "\n" not in str(caught.value)
