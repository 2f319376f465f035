"""Network, search, latency table and pages read an architecture alike."""

import json
import random

import pytest
import torch
from torch import nn

from slimstep.eval.pages.runs import Round, RunRecord
from slimstep.models.architecture import as_architecture, as_json, nested
from slimstep.models.families.unet import Removed
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.prune.evolve import BlockValue, apply, copy, saving
from slimstep.prune.latency import predicted_ms
from tests.models.conftest import SMALL_CONFIGS


def whole_unet(name: str) -> PrunableUNet2DConditionModel:
    with torch.device("meta"):
        return PrunableUNet2DConditionModel(**SMALL_CONFIGS[name])


def random_actions(unet, draw: random.Random):
    """Removals and copies of blocks, perhaps of levels, in a random order."""
    levels = list(unet.levels)[: draw.choice((0, 0, 1, len(unet.levels)))]
    removed = [*levels, *draw.sample(unet.blocks, draw.randint(0, 6))]
    copied = draw.choices(unet.copyable_blocks, k=draw.randint(0, 4))
    actions = [(saving, block) for block in removed] + [(copy, b) for b in copied if b not in removed]
    draw.shuffle(actions)
    return [action(BlockValue(block, 1.0, 0.1, 1.0), latency_ms=100.0) for action, block in actions]


def runs_in(unet, block: str) -> bool:
    """Whether the block's module is still in the network, and is none that stands for a removed one."""
    path = block.split(".")
    try:
        inner = [unet.get_submodule(".".join(path[: n + 1])) for n in range(len(path))]
    except AttributeError:
        return False
    return not any(isinstance(module, Removed) for module in inner)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("seed", range(6))
def test_network_search_table_and_pages_agree_on_any_architecture(name, seed, tmp_path):
    draw, whole = random.Random(seed), whole_unet(name)
    decided = apply({}, random_actions(whole, draw))
    with torch.device("meta"):
        unet = PrunableUNet2DConditionModel(**SMALL_CONFIGS[name], depths=decided)

    kept = tuple(block for block in unet.blocks if runs_in(unet, block))
    assert unet.kept_blocks == kept

    written = json.loads(json.dumps(as_json(decided)))
    times = {block: {"ms": 1.0} for block in whole.blocks}
    rounds = (Round("round-00", {"sites": times}, None, {"after": written}),)
    run = RunRecord(tmp_path, rounds, None, (), {}, None, None)
    assert run.architecture == as_architecture(written) == decided
    assert tuple(block for block in run.latest_blocks if block not in run.removed_in) == kept

    def copies(block: str) -> int:
        copied = getattr(unet.get_submodule(block), "copies", ())
        return len(copied) if isinstance(copied, nn.ModuleList) else 0

    gone = [block for block in unet.blocks if block not in kept]
    outermost = [block for block in gone if not any(nested(block, other) for other in gone if len(other) < len(block))]
    expected = 100 - len(outermost) + sum(map(copies, kept))
    assert predicted_ms({"full_ms": 100.0, "sites": times}, unet) == expected

    assert apply(unet.architecture, []) == unet.architecture
    assert PrunableUNet2DConditionModel.from_config(unet.config).architecture == unet.architecture
    assert as_architecture(unet.config.depths) == unet.architecture
