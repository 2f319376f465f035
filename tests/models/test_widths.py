"""Narrower blocks: surgery is the whole network with columns at zero, parts are named, narrowed again, and travel."""

import json
import random
from contextlib import ExitStack

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from slimstep.models.architecture import as_json
from slimstep.models.families.ddpm.network import PrunableUNet2DModel
from slimstep.models.families.transformer.stock import obstacles_of
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.families.unet2d.stock import stock_config
from slimstep.models.families.widths import parts_of, strongest, units_left
from slimstep.models.family import denoiser_of
from slimstep.models.pipeline import export_pipeline, load_pipeline
from tests.models.conftest import SMALL_CONFIGS, make_small_pipeline, paint, small_inputs, small_stock_unet
from tests.models.families.small import PIPELINES, PRUNABLE, STOCK, run
from tests.models.families.test_ddpm import small_stock_unet as small_ddpm

SHARES = (0.75, 0.5, 0.25)
KINDS = [*SMALL_CONFIGS, "DDPM", *STOCK]


@pytest.fixture(params=KINDS)
def network(request):
    """A prunable network whose biases and norms are not what they are initialised to."""
    name = request.param
    if name in STOCK:
        made = PRUNABLE[name].from_unet(STOCK[name]())
        made.register_to_config(sample_size=8)  # which pipelines of some do not say
    elif name == "DDPM":
        made = PrunableUNet2DModel.from_unet(small_ddpm())
    else:
        made = PrunableUNet2DConditionModel.from_unet(small_stock_unet(name))
    draw = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return made.eval()


def output(network) -> torch.Tensor:
    if isinstance(network, PrunableUNet2DConditionModel):
        with torch.no_grad():
            return network(**small_inputs(network)).sample
    return run(network)


def random_widths(network, seed: int) -> dict[str, dict]:
    """A share of every part of two blocks in three, some left out where that is possible."""
    draw, table = random.Random(seed), {}
    for block, units in network.width_units.items():
        if draw.random() < 2 / 3:
            gone = [part for part in network.removable_parts[block] if draw.random() < 0.3]
            shares = {part: draw.choice(SHARES) for part in units}
            table[block] = {"widths": {**shares, **dict.fromkeys(gone, 0)}}
    return table


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_narrowed_network_is_the_whole_one_without_the_lost_units(network, seed):
    table = random_widths(network, seed)
    narrowed = network.with_architecture(table)
    with ExitStack() as stack:
        for block, entry in table.items():
            for part, share in entry["widths"].items():
                stack.enter_context(network.with_narrower(block, part, share))
        expected = output(network)
    assert difference(output(narrowed), expected) < 2e-5
    assert difference(output(network), expected) > 1e-4, "units that do nothing say nothing"
    assert narrowed.num_parameters() < network.num_parameters()


def test_zeroed_columns_are_put_back(network):
    before = {key: weight.clone() for key, weight in network.state_dict().items()}
    for block, units in network.width_units.items():
        for part in units:
            with pytest.raises(KeyboardInterrupt), network.with_narrower(block, part, 0.5):
                raise KeyboardInterrupt
    assert all(torch.equal(before[key], weight) for key, weight in network.state_dict().items())


def test_masks_copies_and_further_cuts_go_on_from_a_narrowed_network(network):
    table = random_widths(network, 2)
    narrowed = network.with_architecture(table)
    mask_BN = torch.ones(3, len(narrowed.kept_blocks), dtype=torch.bool)
    ours = narrowed.with_architecture({})
    assert as_json(ours.architecture) == as_json(narrowed.architecture) and torch.equal(output(ours), output(narrowed))
    copyable = next((block for block in narrowed.copyable_blocks if block in table), None)
    if copyable:
        entry = {copyable: {"repeats": 2, **table[copyable]}}
        copied = narrowed.with_architecture(entry, copy_init="same")
        zero = narrowed.with_architecture(entry)
        assert difference(output(zero), output(narrowed)) < 1e-6 < difference(output(copied), output(narrowed))
        assert copied.num_parameters() > narrowed.num_parameters()
    block = next(iter(table))
    cut = narrowed.with_architecture({block: 0})
    mask_BN[:, narrowed.kept_blocks.index(block)] = False
    if isinstance(narrowed, PrunableUNet2DConditionModel):
        with torch.no_grad():
            masked = narrowed(**small_inputs(narrowed), block_mask=mask_BN).sample
    else:
        masked = run(narrowed, block_mask_BN=mask_BN)
    assert torch.equal(output(cut), masked)
    assert torch.equal(output(cut.with_architecture({block: table[block]}, source=network)), output(narrowed))


def test_a_block_cut_twice_keeps_the_strongest_of_what_was_left(network):
    block, units = next((b, u) for b, u in network.width_units.items() if max(u.values()) >= 4)
    part = max(units, key=units.get)
    once = network.with_architecture({block: {"widths": {part: 0.5}}})
    twice = once.with_architecture({block: {"widths": {part: 0.25}}})
    at_once = network.with_architecture({block: {"widths": {part: 0.25}}})
    assert torch.equal(output(twice), output(at_once))
    with pytest.raises(ValueError, match=rf"\['{block}'\] are narrower than the architecture has them: lost units"):
        twice.with_architecture({block: {"widths": {part: 0.75}}})
    with pytest.raises(ValueError, match="lost units do not come back"):
        twice.with_architecture({block: 1})


def test_the_strongest_units_stay():
    unet = PrunableUNet2DConditionModel.from_unet(small_stock_unet())
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    part = parts_of(layer)["ff"]
    with torch.no_grad():
        layer.ff.net[2].weight[:, [3, 7]] *= 100
        layer.ff.net[0].proj.weight[[7, part.units + 7]] *= 0
        layer.ff.net[0].proj.bias[[7, part.units + 7]] *= 0
    assert 3 in strongest(layer, part, 1) and 7 not in strongest(layer, part, part.units - 1)
    assert [units_left(8, share) for share in (1, 0.75, 0.5, 0.01, 0)] == [8, 6, 4, 1, 0]


def test_what_has_no_such_part_is_named():
    unet = PrunableUNet2DConditionModel.from_unet(small_stock_unet())
    resnet, attention = "down_blocks.0.resnets.0", "down_blocks.0.attentions.0"
    with pytest.raises(ValueError, match=rf"narrows \['ff'\] of {resnet}, whose parts are \('channels',\)"):
        unet.with_architecture({resnet: {"widths": {"ff": 0.5}}})
    with pytest.raises(ValueError, match=rf"leaves \['channels'\] out of {resnet}; it can do without \(\) alone"):
        unet.with_architecture({resnet: {"widths": {"channels": 0}}})
    with pytest.raises(ValueError, match=r"widths=\{'ff': 1.5\}; widths are \{part: share from 0 to 1\}"):
        unet.with_architecture({attention: {"widths": {"ff": 1.5}}})
    whole = unet.with_architecture({attention: {"widths": {"ff": 1.0}}, resnet: {"widths": {"channels": 1}}})
    assert whole.architecture == {} and stock_config(whole).config is not None


def test_a_narrowed_unet_travels_with_its_class(tmp_path):
    pipeline = make_small_pipeline()
    unet = PrunableUNet2DConditionModel.from_unet(pipeline.unet)
    table = random_widths(unet, 4)
    pipeline.unet = unet.with_architecture({**table, next(iter(table)): {**next(iter(table.values())), "repeats": 1}})
    assert "is narrowed" in str(stock_config(pipeline.unet).obstacles)
    export_pipeline(pipeline, tmp_path / "export")
    written = json.loads((tmp_path / "export/unet/config.json").read_text())["depths"]
    assert written == as_json(pipeline.unet.architecture)
    again = load_pipeline(tmp_path / "export")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert torch.equal(paint(again), paint(pipeline)) and torch.equal(paint(stock), paint(pipeline))


@pytest.mark.parametrize("name", STOCK)
def test_a_narrowed_transformer_travels_with_its_class(name, tmp_path):
    pipeline = PIPELINES[name]()
    network = PRUNABLE[name].from_unet(pipeline.transformer)
    network.register_to_config(sample_size=8)  # which pipelines of some do not say
    pipeline.transformer = network.with_architecture(random_widths(network, 5))
    assert "is narrowed" in str(obstacles_of(pipeline.transformer))
    export_pipeline(pipeline, tmp_path / "export")
    again = load_pipeline(tmp_path / "export").transformer
    assert torch.equal(run(again), run(pipeline.transformer)) and type(again) is PRUNABLE[name]


def test_a_narrowed_network_learns(network):
    narrowed = network.with_architecture(random_widths(network, 6)).requires_grad_()
    loss = output_with_gradient(narrowed).square().mean()
    loss.backward()
    assert all(p.grad is not None for m in narrowed.modules() if isinstance(m, (nn.Conv2d, nn.GroupNorm))
               for p in m.parameters())  # fmt: skip


def output_with_gradient(network) -> torch.Tensor:
    if isinstance(network, PrunableUNet2DConditionModel):
        return network(**small_inputs(network)).sample
    denoiser = denoiser_of(network)
    x_t, t_B, cond = denoiser.example(network, 3, tokens=7, generator=torch.Generator().manual_seed(0))
    return denoiser(network, x_t, t_B, cond)
