"""Unconditional DDPMs: the prunable UNet2DModel, its export, its sampling, its training."""

import json

import pytest
import torch
from diffusers import UNet2DModel

from slimstep.models.families.ddpm.network import PrunableUNet2DModel
from slimstep.models.families.ddpm.stock import stock_config, to_stock

MID = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")


def small_stock_unet(**fields) -> UNet2DModel:
    """16×16 pixels, three levels, self-attention in the inner two; random weights."""
    torch.manual_seed(0)
    fields = {"block_out_channels": (8, 16, 16), "layers_per_block": 2, "norm_num_groups": 4, "attention_head_dim": 4,
              "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
              "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"), **fields}  # fmt: skip
    return UNet2DModel(sample_size=16, **fields).eval()


def small_unet(**fields) -> PrunableUNet2DModel:
    return PrunableUNet2DModel.from_unet(small_stock_unet(**fields))


@pytest.fixture(scope="module")
def unet() -> PrunableUNet2DModel:
    return small_unet()


def run(unet, **inputs) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    x, t_B = torch.randn(3, 3, 16, 16, generator=draw), torch.randint(1000, (3,), generator=draw)
    with torch.no_grad():
        return unet(x, t_B, return_dict=False, **inputs)[0]


# ---- the network


def test_blocks_are_all_resnets_and_attentions_in_order_of_execution(unet):
    assert len(unet.blocks) == 15 + 2 + 10 + 1 and not unet.parents
    assert list(unet.kinds.values()).count("attention") == 11
    calls = []
    handles = [unet.get_submodule(b).register_forward_hook(lambda *_, b=b: calls.append(b)) for b in unet.blocks]
    run(unet)
    assert tuple(calls) == unet.blocks
    for handle in handles:
        handle.remove()


def test_open_masks_are_the_stock_unet(unet):
    mask_BN = torch.ones(3, len(unet.kept_blocks), dtype=torch.bool)
    assert torch.equal(run(unet, block_mask=mask_BN), run(small_stock_unet()))


@pytest.mark.parametrize("rule", ["shortcut", "drop_skip"])
def test_a_closed_mask_is_the_pruned_unet_for_each_sample_alone(rule):
    unet = PrunableUNet2DModel.from_unet(small_stock_unet(), skip_rule=rule)
    mask_BN = torch.rand(3, len(unet.kept_blocks), generator=torch.Generator().manual_seed(2)) < 0.6
    masked = run(unet, block_mask=mask_BN)
    for row, open_N in enumerate(mask_BN.tolist()):
        closed = [block for block, is_open in zip(unet.kept_blocks, open_N, strict=True) if not is_open]
        assert torch.equal(run(unet.with_architecture(dict.fromkeys(closed, 0)))[row], masked[row])


def test_a_fresh_copy_changes_nothing_and_may_learn(unet):
    copied = unet.with_architecture({block: 2 for block in unet.copyable_blocks})
    assert torch.equal(run(copied), run(unet))
    assert {unet.kinds[block] for block in unet.copyable_blocks} == {"resnet", "attention"}
    assert not torch.equal(run(unet.with_architecture({MID[1]: 2}, copy_init="same")), run(unet))


def test_a_mask_survives_gradient_checkpointing():
    unet = small_unet().train()
    x, t_B = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    mask_BN = torch.rand(2, len(unet.kept_blocks)) < 0.5
    grads = []
    for _ in range(2):
        unet.zero_grad()
        unet(x, t_B, block_mask=mask_BN).sample.square().mean().backward()
        grads.append([p.grad.clone() if p.grad is not None else None for p in unet.parameters()])
        unet.enable_gradient_checkpointing()
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_levels_of_ncsnpp_do_not_go_as_a_whole():
    unet = small_unet(down_block_types=("SkipDownBlock2D",) * 3,
                      up_block_types=("SkipUpBlock2D",) * 3,
                      block_out_channels=(16, 16, 16))  # fmt: skip
    assert unet.levels == {} and small_unet().levels.keys() == {"down_blocks.2"}


# ---- what a stock UNet2DModel can express


def layer(index: int, level: int) -> dict[str, int]:
    """One layer less on the way down and on the way up, attention included."""
    down, up = f"down_blocks.{level}", f"up_blocks.{2 - level}"
    return {f"{side}.{part}.{index}": 0 for side in (down, up) for part in ("resnets", "attentions")}


FITS = {
    "nothing": {},
    "one layer of every level": {k: v for level in range(3) for k, v in layer(1, level).items()},
    "the middle": dict.fromkeys(MID, 0),
    "the attention in the middle": {MID[1]: 0},
    "the inner level": {"down_blocks.2": 0},
    "attentions on the way up": {f"up_blocks.0.attentions.{i}": 0 for i in range(3)},
}
FITS_NOT = {
    "one layer of one level": (layer(1, 1), "down_blocks.1 .keeps 1 layers where down_blocks.0 keeps 2"),
    "one attention of a level": ({"down_blocks.1.attentions.0": 0}, "while another of its level stays"),
    "one ResNet in the middle": ({MID[0]: 0}, "or its ResNets, or nothing"),
    "a copy": ({MID[0]: 2}, "is copied"),
}


def pruned(architecture) -> PrunableUNet2DModel:
    blocks = small_unet().blocks
    known = {k: v for k, v in architecture.items() if k in blocks or k == "down_blocks.2"}
    return PrunableUNet2DModel.from_unet(small_stock_unet(), known, "drop_skip")


@pytest.mark.parametrize("name", FITS)
def test_the_stock_unet_has_the_pruned_ones_output(name):
    unet = pruned(FITS[name])
    verdict = stock_config(unet)
    assert not verdict.obstacles
    stock = to_stock(unet)
    assert type(stock) is UNet2DModel and torch.equal(run(stock), run(unet))
    again = UNet2DModel.from_config(json.loads(json.dumps(verdict.config)))
    assert again.num_parameters() == stock.num_parameters() == unet.num_parameters()


@pytest.mark.parametrize("name", FITS_NOT)
def test_what_no_stock_unet_expresses_is_named(name):
    architecture, reason = FITS_NOT[name]
    verdict = stock_config(pruned(architecture))
    assert verdict.config is None and any(reason.replace(" .", " (") in o for o in verdict.obstacles), verdict
    with pytest.raises(ValueError, match="no stock UNet2DModel is this network"):
        to_stock(pruned(architecture))


@pytest.mark.parametrize("which", ["downsample_type", "upsample_type"])
def test_levels_that_resample_by_resnets_keep_their_attention(which):
    unet = small_unet(**{which: "resnet"}).with_architecture({f"up_blocks.0.attentions.{i}": 0 for i in range(3)})
    assert any("resample in another way" in obstacle for obstacle in stock_config(unet).obstacles)
