"""The latency table: what it holds, and that it measures what it says. No test looks at the size of a time."""

import time

import pytest
import torch

from slimstep.eval.config import LatencyConfig
from slimstep.eval.timing.latency import affordable, compare_ms, thread_ms
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.prune.latency import latency_table, predicted_ms, table_without, timing_hooks
from tests.models.conftest import small_stock_unet
from tests.tiny import tiny_pipeline

CPU = torch.device("cpu")
FEW = LatencyConfig(warmup=1, iterations=3, additive_samples=3, text_length=5)


@pytest.fixture(scope="module")
def unet():
    return PrunableUNet2DConditionModel.from_unet(tiny_pipeline().unet)


@pytest.fixture(scope="module")
def table(unet):
    return latency_table(unet, FEW, CPU)


def test_every_kept_block_has_an_entry_and_the_entries_fit_into_the_whole(unet, table):
    assert tuple(table["sites"]) == unet.kept_blocks
    assert 0 < sum(entry["ms"] for entry in table["sites"].values()) < table["full_ms"]


def test_the_table_says_how_it_was_made_and_how_far_it_adds_up(table):
    assert table["method"] == "in_place_hooks" and table["mode"] == "eager" and table["threads"] == 1
    assert table["additive_error"]["n"] == len(table["samples"]) == 3
    assert all(len(sample["removed"]) >= 2 for sample in table["samples"])


def test_the_random_removals_depend_on_the_seed_alone(unet, table):
    again = latency_table(unet, FEW, CPU)
    assert [s["removed"] for s in again["samples"]] == [s["removed"] for s in table["samples"]]


def test_measuring_leaves_the_unet_as_it_was(unet):
    before = [hooks for module in unet.modules() for hooks in module._forward_hooks]
    latency_table(unet, FEW, CPU)
    assert [hooks for module in unet.modules() for hooks in module._forward_hooks] == before


def test_hooks_count_the_time_inside_a_module_and_nothing_else():
    class Busy(torch.nn.Module):
        def forward(self, x):
            end = time.thread_time() + 0.02
            while time.thread_time() < end:
                pass
            return x

    inner, times = Busy(), {"inner": []}
    outer = torch.nn.Sequential(Busy(), inner, Busy())
    with timing_hooks({"inner": inner}, times):
        whole_ms = thread_ms(lambda: outer(torch.zeros(1)))
    assert len(times["inner"]) == 1 and times["inner"][0] < whole_ms / 2


def test_whole_unets_are_compared_under_their_names(unet):
    student = unet.with_architecture({"mid_block.resnets.0": 0})
    assert set(compare_ms({"teacher": unet, "student": student}, FEW, CPU)) == {"teacher", "student"}


def test_a_table_made_elsewhere_counts_removals_and_copies_and_a_removed_transformer_once():
    unet = PrunableUNet2DConditionModel.from_unet(small_stock_unet("sdxl"))
    table = {"full_ms": 100.0, "sites": {block: {"ms": 1.0} for block in unet.blocks}}
    transformer = "mid_block.attentions.0"
    layer = f"{transformer}.transformer_blocks.1"
    copied = next(block for block in unet.copyable_blocks if not block.startswith(transformer))
    expected = [({}, 100), ({transformer: 0}, 99), ({layer: 0}, 99), ({copied: 3}, 102), ({copied: 2, layer: 0}, 100)]
    for architecture, ms in expected:
        pruned = unet.with_architecture(architecture)
        assert predicted_ms(table, pruned) == table_without(table, pruned)["full_ms"] == ms
    assert table_without(table, unet.with_architecture({copied: 3}))["sites"][copied] == {"ms": 3.0}


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match="latency.dtype='int3' is unknown"):
        LatencyConfig(dtype="int3")


def test_slow_networks_are_timed_by_fewer_calls_but_three():
    config = LatencyConfig(warmup=5, iterations=40, seconds=1.0)
    assert affordable(1.0, config) == (5, 40)
    assert affordable(50.0, config) == (0, 20)
    assert affordable(60_000.0, config) == (0, 3)


@pytest.mark.slow
def test_a_compiled_table_has_every_block(unet):
    small = unet.with_architecture(dict.fromkeys(unet.blocks[2:], 0))
    table = latency_table(small, LatencyConfig(iterations=3, additive_samples=1, compile=True), CPU)
    assert table["mode"] == "compiled" and table["method"] == "difference"
    assert tuple(table["sites"]) == small.kept_blocks
