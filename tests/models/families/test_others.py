"""Transformers without a family: every class that is known is pruned, exported, and read by its stock class."""

import copy
import json
import re

import diffusers
import pytest
import torch
from torch import Tensor

from scripts.random_transformers import alive
from slimstep.models.families.transformer.others import OF_FAMILIES, OTHERS, REFUSED, prunable, prunable_class
from slimstep.models.families.transformer.stock import to_stock
from slimstep.models.family import family_at
from tests.other_transformers import KINDS

DEPTH = 3
FAST = ("AuraFlowTransformer2DModel", "MochiTransformer3DModel", "SkyReelsV2Transformer3DModel")  # all take longer
EVERY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in sorted(OTHERS)]


@pytest.fixture
def stock(name):
    torch.manual_seed(0)
    counts = {of.count: DEPTH for of in OTHERS[name].values()}
    return alive(getattr(diffusers, name)(**{**KINDS[name][0], **counts}))


def run(network, name: str, **options) -> list[Tensor]:
    """What a network gives; some change what they are given."""
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(network(**copy.deepcopy(KINDS[name][1]), **options))


def tensors(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert ours and [y.shape for y in ours] == [y.shape for y in theirs]
    return max((y - z).abs().max().item() for y, z in zip(ours, theirs, strict=True))


def removable(network) -> list[str]:
    return [block for block in network.all_blocks if network.reason_to_stay(block) is None]


@pytest.mark.parametrize("name", EVERY)
def test_an_export_is_the_network_in_memory_and_a_closed_mask_the_removed_block(name, stock, tmp_path):
    network = prunable(stock)
    whole, rows = run(stock, name), len(KINDS[name][1][network.INPUT])
    assert difference(run(network, name), whole) == 0
    lists = {path: [block for block in removable(network) if block.startswith(f"{path}.")] for path in network.LISTS}
    middle = {blocks[len(blocks) // 2]: 0 for blocks in lists.values()}  # one of every list
    pruned = network.with_architecture(middle)
    expected = run(pruned, name)
    assert difference(expected, whole) > 1e-3, "a block that does nothing says nothing"
    mask_BN = torch.tensor([[block not in middle for block in network.all_blocks]] * rows)
    assert difference(run(network, name, block_mask=mask_BN), expected) == 0
    to_stock(pruned).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {config[count] for count in network.LISTS.values()} == {DEPTH - 1} and "depths" not in config
    again, info = type(stock).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and difference(run(again.eval(), name), expected) <= 1e-6


@pytest.mark.parametrize(("name", "block"), [("MochiTransformer3DModel", -1), ("DiTTransformer2DModel", 0)])
def test_blocks_that_stay_are_named_with_the_reason(name, block, stock):
    network = prunable(stock)
    path = network.all_blocks[block]
    with pytest.raises(ValueError, match=f"{path} of a {name} cannot be removed: {network.reason_to_stay(path)}"):
        network.with_architecture({path: 0})


@pytest.mark.parametrize("name", ["SkyReelsV2Transformer3DModel"])
def test_no_copies_are_made(stock):
    network = prunable(stock)
    with pytest.raises(ValueError, match="of whose class nobody knows a copy that changes nothing"):
        network.with_architecture({network.all_blocks[1]: 2})


# ---- what is refused


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_classes_that_would_compute_something_else_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=re.escape(f"blocks of a {name} cannot be removed: {REFUSED[name]}; these")):
        prunable_class(getattr(diffusers, name))


def test_a_class_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="blocks of a UNet1DModel .* was never tried; .*AuraFlow.*SD3.*Sana"):
        prunable_class(diffusers.UNet1DModel)


def test_networks_of_families_are_their_own():
    assert {prunable_class(kind.STOCK) for kind in OF_FAMILIES.values()} == {*OF_FAMILIES.values()}
    assert not {*OTHERS} & {*OF_FAMILIES, *REFUSED}


@pytest.mark.parametrize(
    ("network", "way"),
    [("AuraFlowTransformer2DModel", "can be removed without a job"),
     ("ChromaTransformer2DModel", "cannot .* silently")],  # fmt: skip
)
def test_a_pipeline_that_no_job_drives_is_refused_with_what_can_be_done(network, way, tmp_path):
    index = {"_class_name": "AuraFlowPipeline", "transformer": ["diffusers", network]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"no family is known; these are: .*FluxPipeline.*Blocks of a {network} {way}"):
        family_at(tmp_path)
