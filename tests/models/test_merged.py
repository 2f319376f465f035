"""Self-attentions that merge tokens: what is merged into what, when nothing changes, and in place as by surgery."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor

from scripts.random_transformers import small_sd3
from slimstep.models.families.ddpm.network import PrunableUNet2DModel
from slimstep.models.families.merged import MergedAttention, destinations_last, merge_tokens, merged_places
from slimstep.models.families.transformer.networks.sd3 import PrunableSD3Transformer2DModel
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from tests.models.conftest import SMALL_CONFIGS, small_inputs, small_stock_unet
from tests.models.families.test_ddpm import small_stock_unet as small_ddpm

SHARES = (0.1, 0.25, 0.5, 0.75)
GRIDS = [(4, 6), (5, 4), (4, 5), (7, 3)]


@pytest.fixture(params=SMALL_CONFIGS)
def network(request) -> PrunableUNet2DConditionModel:
    return PrunableUNet2DConditionModel.from_unet(small_stock_unet(request.param)).eval()


def output(network, **more) -> torch.Tensor:
    with torch.no_grad():
        return network(**{**small_inputs(network), **more}).sample


def tokens(grid, channels=8, batch=2, seed=0) -> torch.Tensor:
    return torch.randn(batch, grid[0] * grid[1], channels, generator=torch.Generator().manual_seed(seed))


def attention(share: float, grid, heads=2) -> MergedAttention:
    torch.manual_seed(0)
    made = Attention(8, heads=heads, dim_head=4).eval()
    merge_tokens([made], share)
    made.grid = grid
    return made


def plain(merged: MergedAttention, x: torch.Tensor) -> torch.Tensor:
    return Attention.forward(merged, x)


# ---- what is merged into what ----


@pytest.mark.parametrize("grid", GRIDS)
def test_one_token_of_every_cell_is_a_destination(grid):
    order = destinations_last(*grid, torch.device("cpu"))
    height, width = grid
    corners = [y * width + x for y in range(0, height - 1, 2) for x in range(0, width - 1, 2)]
    assert order[-len(corners) :].tolist() == corners and sorted(order.tolist()) == list(range(height * width))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("share", SHARES)
def test_the_most_alike_are_merged_into_their_destinations(grid, share):
    """Against loops over tokens."""
    x, length = tokens(grid), grid[0] * grid[1]
    place_BL, left = merged_places(x, grid, share)
    cells = (grid[0] // 2) * (grid[1] // 2)
    order = destinations_last(*grid, torch.device("cpu")).tolist()
    destinations, sources = order[-cells:], order[:-cells]
    count = min(int(share * length), len(sources))
    assert left == length - count
    for place_L, x_LC in zip(place_BL.tolist(), x, strict=True):
        like = lambda a, b, x_LC=x_LC: torch.cosine_similarity(x_LC[a], x_LC[b], dim=0).item()  # noqa: E731
        best = {source: max(destinations, key=lambda d, s=source: like(s, d)) for source in sources}
        merged = sorted(sources, key=lambda s: -like(s, best[s]))[:count]
        assert all(place_L[source] == place_L[best[source]] for source in merged)
        alone = [place_L[token] for token in range(length) if token not in merged]
        assert sorted(alone) == list(range(left)), "all others have a row of their own"


@pytest.mark.parametrize("grid", [(1, 6), (3, 1), (1, 1)])
def test_where_no_cell_fits_nothing_is_merged(grid):
    x = tokens(grid)
    place_BL, left = merged_places(x, grid, 0.5)
    assert left == grid[0] * grid[1] and (place_BL == torch.arange(left)).all()
    merged = attention(0.5, grid)
    torch.testing.assert_close(merged(x), plain(merged, x))


def test_no_sample_and_no_run_changes_anothers_matches():
    grid, x = (6, 6), tokens((6, 6), batch=5)
    merged = attention(0.5, grid)
    whole = merged(x)
    assert torch.equal(whole, merged(x))
    torch.testing.assert_close(whole[3:4], merged(x[3:4]))


# ---- when nothing changes ----


@pytest.mark.parametrize("grid", GRIDS)
def test_none_merged_is_the_plain_attention(grid):
    x, merged = tokens(grid), attention(0.0, grid)
    torch.testing.assert_close(merged(x), plain(merged, x))


@pytest.mark.parametrize("processor", [None, AttnProcessor])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("share", SHARES)
def test_equal_tokens_of_a_cell_can_be_merged_in_any_number(share, heads, processor):
    cells = tokens((3, 4)).view(2, 3, 4, 8)
    x = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    merged = attention(share, (6, 8), heads)
    if processor:
        merged.set_processor(processor())
    torch.testing.assert_close(merged(x), plain(merged, x), rtol=1e-4, atol=1e-5)
    other = tokens((6, 8), seed=3)
    assert (merged(other) - plain(merged, other)).abs().max() > 1e-3


def test_many_equal_tokens_are_added_in_float32():
    grid = (32, 32)
    x = torch.full((1, 1024, 8), 0.3, dtype=torch.bfloat16)
    merged = attention(0.75, grid).bfloat16()
    torch.testing.assert_close(merged(x), plain(merged, x))


# ---- networks ----


def test_in_place_is_surgery_and_leaves_nothing_behind(network):
    before, changed = output(network), 0
    vars_before = {name: set(vars(module)) for name, module in network.named_modules()}
    for block in network.mergeable_blocks:
        surgery = network.with_architecture({block: {"merge": 0.5}})
        assert surgery.state_dict().keys() == network.state_dict().keys()
        with network.with_merge(block, 0.5):
            inside = output(network)
        assert torch.equal(inside, output(surgery))
        changed += not torch.equal(inside, before)
        with pytest.raises(KeyboardInterrupt), network.with_merge(block, 0.5):
            raise KeyboardInterrupt
    assert torch.equal(output(network), before) and changed >= 4  # innermost levels may be a single token
    assert not any(isinstance(module, MergedAttention) for module in network.modules())
    # The grid is set where it is looked at, and the list of those that look is empty again.
    assert vars_before == {name: set(vars(module)) for name, module in network.named_modules()}
    assert not any(getattr(module, "merged", ()) for module in network.modules())


def test_merging_networks_are_copied_masked_and_taken_back(network):
    table = {block: {"merge": 0.5} for block in network.mergeable_blocks}
    whole = network.with_architecture(table)
    assert torch.equal(output(whole.with_architecture({})), output(whole))
    assert torch.equal(output(whole.with_architecture(dict.fromkeys(table, 1))), output(network))
    block = network.mergeable_blocks[0]
    cut = whole.with_architecture({block: 0})
    mask_BN = torch.ones(3, len(whole.kept_blocks), dtype=torch.bool)
    mask_BN[:, whole.kept_blocks.index(block)] = False
    assert torch.equal(output(whole, block_mask=mask_BN), output(cut))
    copied = {block: {"repeats": 2, "merge": 0.5}}
    assert torch.equal(output(whole.with_architecture(copied)), output(whole))
    twice = whole.with_architecture(copied, copy_init="same")
    doubled = network.with_architecture({block: 2}, copy_init="same")
    with doubled.with_merge(block, 0.5):
        inside = output(doubled)
    assert torch.equal(inside, output(network.with_architecture(copied, copy_init="same")))
    assert not torch.equal(output(twice), output(whole))


def test_copies_of_a_transformer_merge_in_its_layers():
    network = PrunableUNet2DConditionModel.from_unet(small_stock_unet("sdxl")).eval()
    layer = next(block for block in network.mergeable_blocks if block in network.parents)
    table = {network.parents[layer]: 2, layer: {"merge": 0.5}}
    made = network.with_architecture(table, copy_init="same")
    assert sum(isinstance(module, MergedAttention) for module in made.modules()) == 2
    doubled = network.with_architecture({network.parents[layer]: 2}, copy_init="same")
    with doubled.with_merge(layer, 0.5):
        assert torch.equal(output(doubled), output(made))


def test_a_picture_need_not_be_square_and_sizes_may_change():
    network = PrunableUNet2DConditionModel.from_unet(small_stock_unet())
    merging = network.with_architecture({block: {"merge": 0.75} for block in network.mergeable_blocks})
    wide = torch.randn(3, 4, 8, 16, generator=torch.Generator().manual_seed(4))
    assert output(merging, sample=wide).shape == wide.shape
    assert not torch.equal(output(merging, sample=wide), output(network, sample=wide))
    tall = output(merging, sample=wide.mT.contiguous())
    assert tall.shape == wide.mT.shape and output(merging).shape[-2:] == (8, 8)


def test_checkpointed_gradients_are_those_of_the_merging_network():
    network = PrunableUNet2DConditionModel.from_unet(small_stock_unet())
    merging = network.with_architecture({block: {"merge": 0.5} for block in network.mergeable_blocks}).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            merging.enable_gradient_checkpointing()
        merging.zero_grad()
        merging(**small_inputs(merging)).sample.square().mean().backward()
        gradients.append({name: weight.grad.clone() for name, weight in merging.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_merging_unet_is_one_graph():
    network = PrunableUNet2DConditionModel.from_unet(small_stock_unet())
    merging = network.with_architecture({block: {"merge": 0.5} for block in network.mergeable_blocks[:2]})
    expected = output(merging)
    torch.compiler.reset()
    compiled = torch.compile(merging, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(**small_inputs(network)).sample, expected)


# ---- what is refused ----


def test_networks_without_such_attentions_are_named():
    transformer = PrunableSD3Transformer2DModel.from_unet(small_sd3())
    with pytest.raises(ValueError, match="gives transformer_blocks.0 merge=0.5; .*none of a SD3Transformer2DModel"):
        transformer.with_architecture({"transformer_blocks.0": {"merge": 0.5}})
    ddpm = PrunableUNet2DModel.from_unet(small_ddpm())
    block = next(block for block, kind in ddpm.kinds.items() if kind == "attention")
    with pytest.raises(ValueError, match=f"gives {block} merge=0.5; .*none of a UNet2DModel"):
        ddpm.with_architecture({block: {"merge": 0.5}})
    unet = PrunableUNet2DConditionModel.from_unet(small_stock_unet())
    with pytest.raises(ValueError, match=r"gives mid_block.resnets.0 merge=0.5; blocks whose self-attention .*down_bl"):
        unet.with_architecture({"mid_block.resnets.0": {"merge": 0.5}})
    with pytest.raises(ValueError, match="takes no attention mask"):
        attention(0.5, (4, 4))(tokens((4, 4)), attention_mask=torch.ones(2, 1, 16))
