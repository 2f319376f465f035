"""The architecture table: what is removed, copied and put back, and what every UNet keeps from the stock one."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from slimstep.models.architecture import BlockSpec
from slimstep.models.cost import count_parameters
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.reference import CONFIGS
from tests.models.conftest import small_inputs, small_stock_unet


def run(unet, **inputs):
    with torch.no_grad():
        return unet(**{**small_inputs(unet), **inputs}, return_dict=False)[0]


def test_an_unpruned_unet_is_the_stock_unet_bit_for_bit(stock):
    unet = PrunableUNet2DConditionModel.from_unet(stock)
    assert unet.state_dict().keys() == stock.state_dict().keys()
    assert torch.equal(run(unet), run(stock))


def test_blocks_are_the_module_paths_in_order_of_execution(unet):
    ran = []
    for block in unet.blocks:
        unet.get_submodule(block).register_forward_hook(lambda *_, block=block: ran.append(block))
    run(unet)
    assert tuple(ran) == unet.blocks
    assert sum(kind == "resnet" for kind in unet.kinds.values()) == 22
    assert sum(kind == "attention" for kind in unet.kinds.values()) == 16


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_each_block_can_go_and_leaves_a_subset_of_the_stock_weights(stock, every):
    whole = PrunableUNet2DConditionModel.from_unet(stock)
    for block in whole.blocks[::every]:
        pruned = whole.with_architecture({block: 0})
        kept, full = pruned.state_dict(), stock.state_dict()
        assert kept.keys() < full.keys()
        assert all(torch.equal(kept[key], full[key]) for key in kept)
        assert not torch.equal(run(pruned), run(whole)), f"removing {block} changes nothing"


def test_removed_then_added_is_the_start(stock):
    start = PrunableUNet2DConditionModel.from_unet(stock)
    emptied = start.with_architecture(dict.fromkeys(start.blocks, 0))
    back = emptied.with_architecture(dict.fromkeys(start.blocks, 1), source=stock)
    assert back.architecture == {} and emptied.kept_blocks == ()
    weights = back.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in stock.state_dict().items())
    assert torch.equal(run(back), run(stock))


def test_what_stays_keeps_its_own_weights_when_a_block_is_put_back(unet):
    pruned = unet.with_architecture({"down_blocks.1.resnets.0": 0})
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.add_(1)
    back = pruned.with_architecture({"down_blocks.1.resnets.0": 1}, source=unet).state_dict()
    for key, value in unet.state_dict().items():
        is_back = key.startswith("down_blocks.1.resnets.0.")
        assert torch.equal(back[key], value if is_back else value + 1), key


def test_putting_back_without_a_source_names_the_block(unet):
    pruned = unet.with_architecture({"mid_block.resnets.0": 0})
    with pytest.raises(ValueError, match=r"no weights for \['mid_block.resnets.0'\].*source="):
        pruned.with_architecture({"mid_block.resnets.0": 1})


def test_the_new_unet_shares_no_memory_with_the_old(unet):
    other = unet.with_architecture({})
    assert {p.data_ptr() for p in unet.parameters()}.isdisjoint(p.data_ptr() for p in other.parameters())


# ---- copies


def test_a_zero_copy_leaves_the_function_unchanged(stock):
    unet = PrunableUNet2DConditionModel.from_unet(stock)
    deeper = unet.with_architecture(dict.fromkeys(unet.copyable_blocks, 2))
    assert torch.equal(run(deeper), run(unet))
    assert not torch.equal(run(unet.with_architecture({unet.copyable_blocks[0]: 2}, copy_init="same")), run(unet))


def test_the_same_copy_runs_the_block_twice(unet):
    block = "mid_block.resnets.1"
    twice = unet.with_architecture({block: 2}, copy_init="same")
    assert f"{block}.copies.0.conv1.weight" in twice.state_dict()
    module, x, temb = unet.get_submodule(block), torch.randn(2, 16, 2, 2), torch.randn(2, 32)
    assert torch.equal(twice.get_submodule(block)(x, temb), module(module(x, temb), temb))


def test_copies_keep_their_weights_and_come_back_from_a_source(unet):
    three = unet.with_architecture({"mid_block.attentions.0": 3}, copy_init="same")
    with torch.no_grad():
        three.mid_block.attentions[0].copies[1].proj_out.weight.add_(1)
    assert torch.equal(run(three.with_architecture({"mid_block.resnets.0": 1})), run(three))
    one = three.with_architecture({"mid_block.attentions.0": 1})
    assert torch.equal(run(one), run(unet))
    assert torch.equal(run(one.with_architecture({"mid_block.attentions.0": 3}, source=three)), run(three))


def test_a_resnet_that_changes_channels_cannot_be_copied(unet):
    kinds = [unet.kinds[s] for s in unet.copyable_blocks]
    assert (kinds.count("attention"), kinds.count("resnet")) == (16, 9)
    with pytest.raises(ValueError, match=r"copies up_blocks.0.resnets.0, .*can be copied: \('down_blocks.0.resnets.0'"):
        unet.with_architecture({"up_blocks.0.resnets.0": 2})


# ---- layers of transformers


def test_sdxl_layers_are_blocks_inside_their_transformer():
    unet = PrunableUNet2DConditionModel.from_unet(small_stock_unet("sdxl"))
    layers = [s for s in unet.blocks if s in unet.parents]
    assert len(layers) == 2 * 2 + 2 * 3 + 3 + 3 * 3 + 3 * 2
    assert unet.parents["mid_block.attentions.0.transformer_blocks.2"] == "mid_block.attentions.0"
    closed = unet.with_architecture({"mid_block.attentions.0": 0})
    assert not [s for s in closed.kept_blocks if s.startswith("mid_block.attentions.0")]


def test_a_removed_transformer_takes_its_layers_along_and_brings_them_back():
    unet = PrunableUNet2DConditionModel.from_unet(small_stock_unet("sdxl"))
    block = "mid_block.attentions.0"
    gone = unet.with_architecture({f"{block}.transformer_blocks.1": 0}).with_architecture({block: 0})
    assert gone.architecture == {block: BlockSpec(0)}
    assert torch.equal(run(gone.with_architecture({block: 1}, source=unet)), run(unet))


def test_a_copied_transformer_has_the_layers_of_the_one_it_copies():
    unet = PrunableUNet2DConditionModel.from_unet(small_stock_unet("sdxl"))
    block = "mid_block.attentions.0"
    thin = unet.with_architecture({f"{block}.transformer_blocks.1": 0, f"{block}.transformer_blocks.2": 2})
    twice = thin.with_architecture({block: 2}, copy_init="same")
    copied = unet.with_architecture({block: 2}, copy_init="same")
    thin_again = copied.with_architecture({f"{block}.transformer_blocks.1": 0})
    keys = {k.split(".copies.0.", 1)[1] for k in twice.state_dict() if k.startswith(f"{block}.copies.0.")}
    assert keys == {k.removeprefix(f"{block}.") for k in thin.state_dict() if k.startswith(f"{block}.")}
    thin_last = thin_again.with_architecture({f"{block}.transformer_blocks.2": 2})
    assert torch.equal(run(thin_last), run(thin_again))
    expected = unet.with_architecture(thin.architecture).with_architecture({block: 2}, copy_init="same")
    assert torch.equal(run(thin_again), run(expected))


# ---- what is left of a removed ResNet


def test_shortcut_keeps_only_the_1x1_convolution(unet):
    block = "down_blocks.1.resnets.0"
    keys = [k for k in unet.with_architecture({block: 0}).state_dict() if k.startswith(block)]
    assert keys == [f"{block}.conv_shortcut.weight", f"{block}.conv_shortcut.bias"]


def test_drop_skip_passes_the_incoming_features_on(unet):
    block = "up_blocks.3.resnets.1"
    pruned = PrunableUNet2DConditionModel.from_unet(unet, {block: 0}, skip_rule={block: "drop_skip"})
    features, skip = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    assert torch.equal(pruned.get_submodule(block)(torch.cat([features, skip], 1), None), features)
    assert not [k for k in pruned.state_dict() if k.startswith(block)]


def test_drop_skip_as_the_general_rule_holds_wherever_it_is_possible(unet):
    rules = PrunableUNet2DConditionModel.from_unet(unet, skip_rule="drop_skip").skip_rules
    shortcut = {s for s, rule in rules.items() if rule == "shortcut"}
    assert shortcut == {"down_blocks.1.resnets.0", "up_blocks.3.resnets.0"}
    assert len(rules) == 13


def test_an_impossible_drop_skip_names_the_block_and_the_alternatives(unet):
    message = r"impossible at up_blocks.3.resnets.0, which has \('shortcut',\); possible at"
    with pytest.raises(ValueError, match=message):
        PrunableUNet2DConditionModel.from_unet(unet, skip_rule={"up_blocks.3.resnets.0": "drop_skip"})
    with pytest.raises(ValueError, match="the skip rule is 'none'; choose"):
        PrunableUNet2DConditionModel.from_unet(unet, skip_rule="none")


def test_the_innermost_level_goes_with_its_resampling(unet):
    small = unet.with_architecture({"down_blocks.3": 0})
    parts = ("down_blocks.3", "down_blocks.2.downsamplers", "mid_block", "up_blocks.0")
    kept = [key for key in small.state_dict() if key.startswith(parts)]
    assert not kept and len(small.kept_blocks) == 38 - 8
    assert torch.equal(run(small.with_architecture({"down_blocks.3": 1}, source=unet)), run(unet))
    assert not torch.equal(run(small), run(unet))
    with pytest.raises(ValueError, match="from the inside out"):
        unet.with_architecture({"down_blocks.2": 0})


# ---- mistakes


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"down_blocks.9.resnets.0": 0}, r"unknown blocks \['down_blocks.9.resnets.0'\]; this network has \('down_bl"),
        ({"mid_block.resnets.0": -1}, "mid_block.resnets.0 repeats=-1"),
        ({"mid_block.resnets.0": 0.5}, "mid_block.resnets.0 repeats=0.5"),
        ({"down_blocks.3": 2}, "down_blocks.3 repeats=2"),
    ],
)
def test_mistakes_in_the_table_are_named(unet, architecture, message):
    with pytest.raises(ValueError, match=message):
        unet.with_architecture(architecture)


# ---- saving, and the real sizes


def test_save_and_load_keep_table_weights_and_output(stock, tmp_path):
    whole = PrunableUNet2DConditionModel.from_unet(stock, skip_rule="drop_skip")
    unet = whole.with_architecture(
        {whole.blocks[1]: 0, whole.blocks[-2]: 0, whole.copyable_blocks[-1]: 3, whole.blocks[4]: 1}
    )
    for _ in range(2):
        unet.save_pretrained(tmp_path)
        load = PrunableUNet2DConditionModel.from_pretrained
        loaded, info = load(tmp_path, output_loading_info=True, disable_mmap=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert (loaded.architecture, loaded.skip_rules) == (unet.architecture, unet.skip_rules)
        assert loaded.kept_blocks == unet.kept_blocks
        assert torch.equal(run(loaded), run(unet))
        unet = loaded
    assert PrunableUNet2DConditionModel.from_config(unet.config).architecture == unet.architecture
    assert whole.blocks[4] not in unet.config.depths


def test_stock_weights_load_as_they_are(tmp_path):
    stock = small_stock_unet()
    stock.save_pretrained(tmp_path)
    unet = PrunableUNet2DConditionModel.from_pretrained(tmp_path, disable_mmap=True)
    assert torch.equal(run(unet), run(stock))


def test_a_deep_copy_is_a_unet_of_its_own(unet):
    twin = copy.deepcopy(unet.with_architecture({"mid_block.attentions.0": 2}, copy_init="same"))
    mask = torch.ones(3, 38, dtype=torch.bool).index_fill_(1, torch.tensor([5]), False)
    closed = run(twin, block_mask=mask)
    assert torch.equal(closed, run(twin.with_architecture({unet.blocks[5]: 0}))) and not torch.equal(closed, run(twin))


@pytest.mark.parametrize(
    ("name", "parameters", "num_blocks"),
    [("sd15", 859_520_964, 38), ("sd21", 865_910_724, 38), ("sdxl", 2_567_463_684, 17 + 11 + 70)],
)
def test_the_real_configurations_build_and_prune(name, parameters, num_blocks):
    config = CONFIGS[name]
    with torch.device("meta"):
        whole = PrunableUNet2DConditionModel(**config)
        removed = count_parameters(whole.get_submodule("mid_block.attentions.0"))
        pruned = PrunableUNet2DConditionModel(depths={"mid_block.attentions.0": 0}, **config)
    assert (count_parameters(whole), len(whole.blocks)) == (parameters, num_blocks)
    assert count_parameters(pruned) == parameters - removed
    assert isinstance(whole, UNet2DConditionModel)
