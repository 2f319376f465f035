"""Attentions and feed-forwards of transformer blocks as blocks of their own: masks, removal, copies, exports."""

import subprocess
import sys

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, DiffusionPipeline
from torch import nn

from scripts.random_transformers import (
    small_sd3,
    small_sd3_pipeline,
)
from slimstep.engine.low_rank import add_low_rank, merge_low_rank
from slimstep.models.families.transformer.network import submodule
from slimstep.models.families.transformer.networks.sd3 import PrunableSD3Transformer2DModel
from slimstep.models.families.transformer.others import prunable
from slimstep.models.families.transformer.stock import to_stock
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from tests.models.families.small import PIPELINES, PRUNABLE, STOCK, run
from tests.other_transformers import KINDS

# The layers that a sublayer's output comes from alone: with these at zero it adds nothing.
SOURCES = {
    "attn": ("attn.to_out.0", "attn.to_add_out", "attn2.to_out.0", "attn.to_v"), "attn1": ("attn1.to_out.0",),
    "attn2": ("attn2.to_out.0",), "ff": ("ff.net.2", "ff_context.net.2", "ff.conv_point"), "proj_mlp": ("proj_mlp",),
    "ffn": ("ffn.net.2",), "img_mlp": ("img_mlp.net.2", "txt_mlp.net.2"),
}  # fmt: skip


@pytest.fixture(scope="module", params=STOCK)
def family(request) -> str:
    return request.param


def divided(family: str):
    network = PRUNABLE[family].from_unet(STOCK[family]())
    network.divide_blocks()
    network.register_to_config(sample_size=8)  # which pipelines of some do not say
    return network


@pytest.fixture(scope="module")
def network(family):
    return divided(family)


def test_every_entry_has_its_sublayers_behind_it(network, family):
    whole = [path for path in network.all_blocks if path not in network.parents]
    assert whole == [*PRUNABLE[family].from_unet(STOCK[family]()).all_blocks]
    for block in whole:
        own = [path for path, holder in network.parents.items() if holder == block]
        at = network.all_blocks.index(block) + 1
        assert len(own) >= 2 and list(network.all_blocks[at : at + len(own)]) == own
        assert {network.kinds[path] for path in own} == {"sublayer"} and network.kinds[block] == "transformer"
    assert set(network.copyable_blocks) <= set(whole)


def test_open_masks_are_the_stock_transformer(network, family):
    stock = STOCK[family]()
    stock.register_to_config(sample_size=8)
    mask_BN = torch.ones(3, len(network.all_blocks), dtype=torch.bool)
    assert torch.equal(run(network), run(stock)) and torch.equal(run(network, block_mask_BN=mask_BN), run(stock))


def test_a_removed_sublayer_adds_nothing(network):
    for block, holder in network.parents.items():
        expected = network.with_architecture({})
        for name in SOURCES[block.removeprefix(f"{holder}.")]:
            entry = expected.get_submodule(holder)
            if name == "attn.to_v" and submodule(entry, "attn.to_out") is not None:
                continue  # where attention has an output layer, zeros there say it
            for parameter in layer.parameters() if (layer := submodule(entry, name)) is not None else ():
                nn.init.zeros_(parameter)
        pruned = network.with_architecture({block: 0})
        assert torch.equal(run(pruned), run(expected)), block
        assert (run(pruned) - run(network)).abs().max() > 1e-4, "a block that does nothing says nothing"
        assert pruned.num_parameters() < network.num_parameters()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_closed_mask_is_the_pruned_transformer_for_each_sample_alone(network, seed):
    draw = torch.Generator().manual_seed(seed)
    mask_BN = torch.rand(3, len(network.all_blocks), generator=draw) < 0.7
    masked = run(network, block_mask_BN=mask_BN)
    for row, open_N in enumerate(mask_BN.tolist()):
        closed = [block for block, is_open in zip(network.all_blocks, open_N, strict=True) if not is_open]
        assert torch.equal(run(network.with_architecture(dict.fromkeys(closed, 0)))[row], masked[row])


def test_what_is_pruned_takes_masks_and_is_put_back(network):
    whole = [path for path in network.all_blocks if path not in network.parents]
    sublayer = next(path for path, holder in network.parents.items() if holder == whole[1])
    pruned = network.with_architecture({sublayer: 0, whole[0]: 2}, copy_init="same")
    mask_BN = torch.ones(3, len(pruned.kept_blocks), dtype=torch.bool)
    assert torch.equal(run(pruned, block_mask_BN=mask_BN), run(pruned))
    again = pruned.with_architecture({sublayer: 1, whole[0]: 1}, source=network)
    assert torch.equal(run(again), run(network))


def test_the_sublayers_of_a_copy_go_with_the_copied_ones(network):
    block = network.copyable_blocks[0]
    sublayer = next(path for path, holder in network.parents.items() if holder == block)
    copied = network.with_architecture({block: 2}, copy_init="same")
    mask_BN = torch.ones(3, len(copied.kept_blocks), dtype=torch.bool)
    mask_BN[:, copied.kept_blocks.index(sublayer)] = False
    pruned = copied.with_architecture({sublayer: 0})
    assert torch.equal(run(copied, block_mask_BN=mask_BN), run(pruned))


def test_only_whole_blocks_leave_as_diffusers_own_class(network):
    whole = [path for path in network.all_blocks if path not in network.parents]
    pruned = network.with_architecture({whole[1]: 0})
    assert type(to_stock(pruned)) is network.STOCK and torch.equal(run(to_stock(pruned)), run(pruned))
    sublayer = next(iter(network.parents))
    with pytest.raises(ValueError, match=f"because {sublayer} is removed, and the blocks of a"):
        to_stock(network.with_architecture({sublayer: 0}))


def test_an_export_carries_its_class_and_draws_the_same(family, tmp_path):
    pipeline = PIPELINES[family]()
    network = PRUNABLE[family].from_unet(pipeline.transformer)
    network.divide_blocks()
    sublayers = [*network.parents]
    pruned = network.with_architecture({sublayers[1]: 0, network.parents[sublayers[-1]]: 0})
    report = export_pipeline(with_unet(pipeline, pruned), tmp_path / "export")
    assert not report.is_stock and report.obstacles[0].startswith(f"{sublayers[1]} is removed")
    assert not report.readers["ComfyUI"].reads and report.blocks[sublayers[1]] == []
    assert all(report.blocks[path] == [] for path in pruned.parts_of(sublayers[1])), "what goes with it"
    ours = load_pipeline(tmp_path / "export").transformer
    assert ours.architecture == pruned.architecture and ours.all_blocks == pruned.all_blocks
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family.startswith("SD3") else {}
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "export", trust_remote_code=True, **absent).transformer
    for network in (ours, theirs, pruned):
        network.register_to_config(sample_size=8)
    assert torch.equal(run(ours), run(pruned)) and torch.equal(run(theirs), run(pruned))


def test_a_low_rank_update_does_not_open_a_mask(network):
    """A sublayer may be a linear layer itself, as FLUX's proj_mlp."""
    own = network.with_architecture({})
    add_low_rank(own, 2, seed=0)
    torch.manual_seed(1)
    for name, parameter in own.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    mask_BN = torch.ones(3, len(own.all_blocks), dtype=torch.bool)
    mask_BN[:, [own.all_blocks.index(block) for block in own.parents]] = False
    masked = run(own, block_mask_BN=mask_BN)
    merge_low_rank(own)
    torch.testing.assert_close(masked, run(own, block_mask_BN=mask_BN), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_process_without_this_project_draws_from_an_export(tmp_path):
    network = PrunableSD3Transformer2DModel.from_unet(small_sd3())
    network.divide_blocks()
    pruned = network.with_architecture({"transformer_blocks.1.attn": 0})
    export_pipeline(with_unet(small_sd3_pipeline(), pruned), tmp_path / "export")
    code = (
        "import sys; sys.modules['slimstep'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        "absent = {'text_encoder_3': None, 'tokenizer_3': None}\n"
        "p = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True, **absent)\n"
        "p('a', num_inference_steps=1, height=16, width=16)\n"
        "print(type(p.transformer).__name__)"
    )  # fmt: skip
    command = [sys.executable, "-c", code, tmp_path / "export"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0 and "PrunableSD3Transformer2DModel" in ran.stdout, ran.stderr


def test_networks_whose_blocks_cannot_be_divided_say_so(network, family):
    pruned = network.with_architecture({network.all_blocks[0]: 0})
    with pytest.raises(ValueError, match="cannot be divided: it is pruned at"):
        pruned.divide_blocks()


def test_the_sublayers_of_other_classes_are_not_known():
    other = prunable(AuraFlowTransformer2DModel(**KINDS["AuraFlowTransformer2DModel"][0]))
    with pytest.raises(ValueError, match="the sublayers of a AuraFlowTransformer2DModel are not known"):
        other.divide_blocks()
