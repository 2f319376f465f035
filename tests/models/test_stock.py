"""What a stock configuration can express, and that the conversion changes no output."""

import json
import random

import pytest
import torch
from diffusers import UNet2DConditionModel

from slimstep.models.cost import count_parameters
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.families.unet2d.stock import stock_config, to_stock
from tests.models.conftest import small_inputs, small_stock_unet

MID = dict.fromkeys(("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"), 0)


def one_layer_less(unet, down_layer: int = 1, up_layer: int = 1) -> dict[str, int]:
    """BK-SDM's rule: a layer out of every level, on the way down and on the way up."""
    ends = {"down_blocks": f".{down_layer}", "up_blocks": f".{up_layer}"}
    blocks = [s for s in unet.blocks if s not in unet.parents and not s.startswith("mid")]
    return {s: 0 for s in blocks if s.endswith(ends[s.split(".")[0]])}


def pruned(architecture, name="sd15", skip_rule="drop_skip"):
    return PrunableUNet2DConditionModel.from_unet(small_stock_unet(name), architecture, skip_rule)


def run(unet):
    with torch.no_grad():
        return unet(**small_inputs(unet), return_dict=False)[0]


def assert_stock(unet) -> dict:
    """The stock UNet has the pruned one's parameters and output; returns its config, once through JSON."""
    equivalent = stock_config(unet)
    assert not equivalent.obstacles
    config = json.loads(json.dumps(equivalent.config))
    stock = to_stock(unet)
    assert type(stock) is UNet2DConditionModel and not stock.training
    assert count_parameters(stock) == count_parameters(UNet2DConditionModel.from_config(config))
    assert torch.equal(run(stock), run(unet))
    return config


def test_the_unpruned_unet_is_its_own_stock_config(stock):
    config = assert_stock(PrunableUNet2DConditionModel.from_unet(stock))
    assert config == json.loads(json.dumps({k: v for k, v in stock.config.items() if not k.startswith("_")}))


BK_SDM = {
    "base": ({}, 579_384_964, {}),
    "small": (MID, 482_346_884, {"mid_block_type": None}),
    "tiny": (
        {"down_blocks.3": 0},
        323_384_964,
        {
            "mid_block_type": None,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        },
    ),
}


@pytest.mark.parametrize("name", BK_SDM)
def test_bk_sdm_has_its_published_size_as_a_table_and_as_a_stock_config(name):
    more, parameters, fields = BK_SDM[name]
    with torch.device("meta"):
        whole = PrunableUNet2DConditionModel(cross_attention_dim=768)
        architecture = {**one_layer_less(whole), **more}
        unet = PrunableUNet2DConditionModel(cross_attention_dim=768, depths=architecture, bypass="drop_skip")
        published = UNet2DConditionModel(cross_attention_dim=768, layers_per_block=1, **fields)
    assert count_parameters(unet) == count_parameters(published) == parameters
    stock = to_stock(unet)
    shapes = {key: value.shape for key, value in stock.state_dict().items()}
    assert shapes == {key: value.shape for key, value in published.state_dict().items()}


@pytest.mark.parametrize("name", BK_SDM)
def test_bk_sdm_networks_keep_their_output_as_stock_unets(name):
    whole = pruned({})
    config = assert_stock(pruned({**one_layer_less(whole), **BK_SDM[name][0]}))
    assert config["layers_per_block"] == 1


def test_which_of_two_equal_skip_connections_goes_does_not_matter():
    """Without down_blocks.3.resnets.1 its input is on the stack twice; either up ResNet may be the one to go."""
    for layer in (0, 1):
        assert_stock(pruned({"down_blocks.3.resnets.1": 0, f"up_blocks.0.resnets.{layer}": 0}))
    equivalent = stock_config(pruned({"down_blocks.3.resnets.1": 0, "up_blocks.0.resnets.2": 0}))
    reason = "up_blocks.0.resnets.1 (would lose its skip connection from down_blocks.3.resnets.0)"
    assert equivalent.obstacles == (reason,)


def test_the_first_layer_of_a_level_can_go_where_channels_stay():
    architecture = {"down_blocks.0.resnets.0": 0, "down_blocks.0.attentions.0": 0}
    architecture |= {"up_blocks.3.resnets.2": 0, "up_blocks.3.attentions.2": 0}
    assert assert_stock(pruned(architecture))["layers_per_block"] == [1, 2, 2, 2]


def test_a_level_may_lose_all_its_layers():
    architecture = {"down_blocks.3.resnets.0": 0, "down_blocks.3.resnets.1": 0}
    architecture |= {"up_blocks.0.resnets.0": 0, "up_blocks.0.resnets.1": 0}
    assert assert_stock(pruned(architecture))["layers_per_block"] == [2, 2, 2, 0]


def test_levels_without_attention_and_the_mid_block_s_forms():
    attentions = [s for s in pruned({}).blocks if "attentions" in s]
    level = dict.fromkeys((s for s in attentions if s.startswith(("down_blocks.0", "up_blocks.1"))), 0)
    config = assert_stock(pruned(level))
    assert config["down_block_types"][0] == "DownBlock2D" and config["up_block_types"][1] == "UpBlock2D"
    assert assert_stock(pruned(dict.fromkeys(attentions, 0) | MID))["mid_block_type"] is None
    for resnet in ("mid_block.resnets.0", "mid_block.resnets.1"):
        config = assert_stock(pruned({"mid_block.attentions.0": 0, resnet: 0}))
        assert config["mid_block_type"] == "UNetMidBlock2D"


def test_transformer_layers_of_sdxl_become_config_fields():
    unet = pruned({}, "sdxl")
    layers = {a: [s for s in unet.parents if unet.parents[s] == a] for a in unet.parents.values()}
    first = {f"{a}.transformer_blocks.0": 0 for a in layers}
    assert assert_stock(pruned(first, "sdxl"))["transformer_layers_per_block"] == [1, 1, 2]
    everywhere = {f"{a}.transformer_blocks.1": 2 for a in layers if a.startswith("up")}
    config = assert_stock(unet.with_architecture(everywhere, copy_init="same"))
    assert config["transformer_layers_per_block"] == [1, 2, 3]
    assert config["reverse_transformer_layers_per_block"] == [4, 3, 1]
    uneven = {"up_blocks.0.attentions.1.transformer_blocks.0": 0, "down_blocks.1.attentions.1.transformer_blocks.1": 0}
    config = assert_stock(pruned(uneven, "sdxl"))
    assert config["transformer_layers_per_block"] == [1, [2, 1], 3]
    assert config["reverse_transformer_layers_per_block"] == [[3, 2, 3], 2, 1]
    empty = dict.fromkeys(layers["up_blocks.1.attentions.0"], 0)
    assert_stock(pruned(empty, "sdxl"))


OBSTACLES = {
    "down_blocks.0.attentions.1": "is removed while another of its level stays",
    "down_blocks.0.resnets.1": "down_blocks.0.attentions.1 (stays without its ResNet)",
    "down_blocks.1.resnets.0": "is removed but for its 1×1 shortcut",
    "down_blocks.3.resnets.1": "up_blocks.0 (keeps 3 layers where down_blocks.3 keeps 1;",
    "mid_block.attentions.0": "of a stock mid block all stays, or one ResNet, or nothing",
}


@pytest.mark.parametrize("block", OBSTACLES)
def test_obstacles_name_the_block_and_the_reason(block):
    equivalent = stock_config(pruned({block: 0}))
    assert equivalent.config is None and OBSTACLES[block] in equivalent.obstacles[0]
    with pytest.raises(ValueError, match="no stock UNet2DConditionModel is this network, because of"):
        to_stock(pruned({block: 0}))


def test_copies_and_the_mid_block_s_own_depth_are_obstacles():
    assert stock_config(pruned({"mid_block.resnets.0": 2})).obstacles == ("mid_block.resnets.0 (is copied)",)
    equivalent = stock_config(pruned({"mid_block.attentions.0.transformer_blocks.0": 0}, "sdxl"))
    assert "mid_block.attentions.0 (has 2 layers where down_blocks.2's first has 3" in equivalent.obstacles[0]


def random_table(unet, draw: random.Random) -> dict[str, int]:
    """Removals that respect layers and skip connections often enough for many to be expressible."""
    architecture = {}
    for level, up in ((level, len(unet.config.block_out_channels) - 1 - level) for level in range(4)):
        for _ in range(draw.choice((0, 1, 1, 2))):
            down_layer, up_layer = draw.randrange(2), draw.randrange(3)
            for block in (f"down_blocks.{level}.%s.{down_layer}", f"up_blocks.{up}.%s.{up_layer}"):
                architecture |= {block % kind: 0 for kind in ("resnets", "attentions")}
    architecture |= draw.choice(({}, MID, {"mid_block.attentions.0": 0, "mid_block.resnets.1": 0}))
    return {block: 0 for block in architecture if block in unet.blocks}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_declared_expressible_is_exact(seed):
    draw, expressible = random.Random(seed), 0
    for _ in range(40):
        unet = pruned(random_table(pruned({}), draw))
        if stock_config(unet).config is not None:
            assert_stock(unet)
            expressible += 1
    assert expressible >= 3
