"""The pictures show what the numbers say."""

import math

import pytest

from slimstep.eval.pages.figures import Point, pareto_figure, pareto_front, themed
from slimstep.eval.pages.runs import Block
from slimstep.eval.pages.text import decimals, difference, digits, fixed, score, signed
from slimstep.eval.pages.unet_figure import BOX_H, BOX_W, places, unet_figure, value_norm
from slimstep.models.architecture import as_architecture
from tests.eval.run_stub import sd15_blocks

SDXL = ("down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "down_blocks.1.attentions.0",
        *(f"down_blocks.1.attentions.0.transformer_blocks.{k}" for k in range(2)), "mid_block.resnets.0",
        "up_blocks.0.resnets.0", "up_blocks.1.resnets.0")  # fmt: skip


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_boxes_do_not_overlap_and_levels_go_down_and_up_again():
    corners = places(sd15_blocks())
    assert set(corners) == set(sd15_blocks())
    boxes = sorted(corners.values())
    for i, (x, y) in enumerate(boxes):
        assert all(abs(x - u) >= BOX_W or abs(y - v) >= BOX_H for u, v in boxes[i + 1 :])
    height = {block: y for block, (_, y) in corners.items()}
    assert height["down_blocks.0.resnets.0"] == height["up_blocks.3.resnets.0"] == 0
    assert height["down_blocks.3.resnets.0"] == height["up_blocks.0.resnets.0"] > height["mid_block.resnets.0"]
    assert corners["down_blocks.2.attentions.1"][0] < corners["up_blocks.1.resnets.0"][0]


def test_a_box_shows_the_blocks_numbers_and_what_became_of_it():
    blocks = {block: Block(block, 1.25, 0.1, 0.5) for block in sd15_blocks()}
    blocks["down_blocks.0.resnets.0"] = Block("down_blocks.0.resnets.0", -0.5, 0.2, 0.25)
    architecture = as_architecture({"down_blocks.0.resnets.0": 0, "up_blocks.3.attentions.2": 2})
    shown = words(unet_figure(blocks, architecture, {"down_blocks.0.resnets.0": 1}, latent_size=64))
    assert "−0.50" in shown and "±0.20 · 0.250 ms" in shown
    assert "ResNet 0  r1" in shown and "attn 2  ×2" in shown
    assert "64×64" in shown and "8×8" in shown


def test_blocks_that_were_not_scored_are_drawn_without_a_value():
    blocks = {block: Block(block, ms=0.5) for block in sd15_blocks()}
    assert words(unet_figure(blocks, {})).count("not scored") == len(blocks)


def test_transformer_layers_are_cells_under_their_block():
    blocks = {block: Block(block, 1.0, 0.1, 0.5) for block in SDXL}
    assert len(places(SDXL)) == len(SDXL) - 2
    figure = unet_figure(blocks, as_architecture({"down_blocks.1.attentions.0.transformer_blocks.1": 0}))
    assert sum(type(patch).__name__ == "Rectangle" for patch in figure.axes[0].patches) == 2


def test_a_transformers_blocks_stand_in_columns_a_new_one_for_each_list():
    paths = [f"transformer_blocks.{i}" for i in range(19)] + [f"single_transformer_blocks.{i}" for i in range(3)]
    corners = places(paths)
    columns: dict[float, list[float]] = {}
    for x, y in corners.values():
        columns.setdefault(x, []).append(y)
    assert [*corners] == paths and [len(column) for column in columns.values()] == [10, 9, 3]
    assert sorted(columns) == [*columns] and all(sorted(ys, reverse=True) == ys for ys in columns.values())
    blocks = {path: Block(path, 1.0, 0.1, 0.5) for path in paths}
    shown = words(unet_figure(blocks, as_architecture({paths[0]: 0, paths[19]: 2}), {paths[0]: 0}))
    assert "block 0  r0" in shown and "single 0  ×2" in shown


def test_colours_are_centred_on_no_value():
    norm = value_norm([Block("a", 4.0, 0.1, 1.0), Block("b", -1.0, 0.1, 1.0), Block("c", 1.0, 0.1, 0.0)])
    assert (norm(0), norm(4), norm(1), norm(-1)) == pytest.approx((0.5, 1, 0.75, 0.25))


def test_the_front_holds_what_none_beats_in_both():
    points = [Point(name, ms, clip, 0.1) for name, ms, clip in
              (("slow", 10, 31.0), ("beaten", 9, 29.0), ("fast", 5, 30.0), ("faster, worse", 4, 25.0))]  # fmt: skip
    assert [point.label for point in pareto_front(points)] == ["faster, worse", "fast", "slow"]


def test_labels_of_close_points_do_not_cover_each_other():
    figure = pareto_figure([Point(f"model {k}", 5 + 0.001 * k, 30 + 0.001 * k, 0.1) for k in range(4)])
    texts = figure.axes[0].texts
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_a_themed_figure_takes_the_pages_colours_and_font():
    svg = themed(pareto_figure([Point("teacher", 10, 31, 0.1, "teacher")]), "name")
    assert svg.startswith("<svg") and "var(--ink)" in svg and "var(--sans)" in svg
    assert "#1b1f24" not in svg and "DejaVu" not in svg


def test_numbers_read_well():
    assert [digits(x) for x in (0.05666, 7.9, 10.0, 803.3, 12345)] == ["0.0567", "7.90", "10.0", "803", "12345"]
    assert [signed(x) for x in (0.5, -0.25)] == ["+0.50", "−0.25"]


def test_sublayers_stand_beside_their_block():
    paths = [f"transformer_blocks.{i}{part}" for i in range(12) for part in ("", ".attn", ".ff")]
    corners = places(paths)
    assert set(corners) == set(paths)
    for i in range(12):
        block, attn, ff = (corners[f"transformer_blocks.{i}{part}"] for part in ("", ".attn", ".ff"))
        assert block[1] == attn[1] == ff[1] and block[0] + BOX_W < attn[0] and attn[0] + BOX_W < ff[0]
    boxes = sorted(corners.values())
    for i, (x, y) in enumerate(boxes):
        assert all(abs(x - u) >= BOX_W or abs(y - v) >= BOX_H for u, v in boxes[i + 1 :])
    blocks = {path: Block(path, 1.0, 0.1, 0.5) for path in paths}
    shown = words(unet_figure(blocks, as_architecture({"transformer_blocks.1.ff": 0}), {"transformer_blocks.1.ff": 0}))
    assert shown.count("ff") == 11 and "ff  r0" in shown and "block 11" in shown


@pytest.mark.parametrize(
    ("error", "shown"),
    [(12.0, 2), (0.5, 2), (0.02, 2), (0.0099, 3), (0.0004, 4), (1e-12, 4), (0.0, 2), (None, 2), (math.nan, 2)],
)
def test_a_value_has_the_decimals_in_which_its_error_begins(error, shown):
    assert decimals(error) == shown


def test_small_values_are_not_shown_as_nothing():
    assert score({"mean": 0.00312, "se": 0.0004}) == "0.0031 ± 0.0004"
    assert score({"mean": 83.2, "se": 0.47}) == "83.20 ± 0.47"
    assert difference({"mean": 0.0031, "low": 0.0021, "high": 0.0041}) == "+0.0031 [+0.0021, +0.0041]"
    assert difference({"mean": -0.5, "low": -1.25, "high": 0.25}) == "−0.50 [−1.25, +0.25]" and difference(None) == "–"
    assert (fixed(0.0004), fixed(0.5), fixed(None)) == ("0.0004", "0.50", "–")
