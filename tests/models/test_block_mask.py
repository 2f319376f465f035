"""Block masks: an open one is the stock UNet, a closed one the pruned UNet, for each sample alone, to the bit."""

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D

from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from tests.models.conftest import small_inputs, small_stock_unet
from tests.tiny import small_pipeline, small_unet


def random_mask(unet, seed: int, batch: int = 3, open_prob: float = 0.6) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(batch, len(unet.kept_blocks), generator=draw) < open_prob


def closed_blocks_of(unet, row: torch.Tensor) -> dict[str, int]:
    return {block: 0 for block, is_open in zip(unet.kept_blocks, row.tolist(), strict=True) if not is_open}


def run(unet, **inputs):
    with torch.no_grad():
        return unet(**small_inputs(unet), **inputs, return_dict=False)[0]


def test_open_masks_are_the_stock_unet(stock):
    unet = PrunableUNet2DConditionModel.from_unet(stock)
    assert torch.equal(run(unet, block_mask=random_mask(unet, 0, open_prob=1.1)), run(stock))


@pytest.mark.parametrize("skip_rule", ["shortcut", "drop_skip"])
def test_closed_blocks_are_the_pruned_unet_in_every_row_of_a_mixed_batch(stock, skip_rule):
    unet = PrunableUNet2DConditionModel.from_unet(stock, skip_rule=skip_rule)
    mask = random_mask(unet, 1)
    masked = run(unet, block_mask=mask)
    for b, row in enumerate(mask):
        assert torch.equal(run(unet.with_architecture(closed_blocks_of(unet, row)))[b], masked[b])


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_each_block_alone_closed_is_the_unet_without_it(stock, every):
    unet = PrunableUNet2DConditionModel.from_unet(stock)
    for column, block in list(enumerate(unet.blocks))[::every]:
        mask = torch.ones(3, len(unet.blocks), dtype=torch.bool)
        mask[1, column] = False
        without = run(unet.with_architecture({block: 0}))
        assert torch.equal(run(unet, block_mask=mask)[1], without[1]), block


def test_masks_of_a_pruned_and_copied_unet_follow_its_kept_blocks():
    whole = PrunableUNet2DConditionModel.from_unet(small_stock_unet("sdxl"))
    attention = "mid_block.attentions.0"
    architecture = {attention: 2, f"{attention}.transformer_blocks.0": 2, "up_blocks.0.resnets.1": 0}
    unet = whole.with_architecture(architecture, copy_init="same")
    assert torch.equal(run(unet, block_mask=random_mask(unet, 0, open_prob=1.1)), run(unet))
    mask = random_mask(unet, 2)
    masked = run(unet, block_mask=mask)
    for b, row in enumerate(mask):
        assert torch.equal(run(unet.with_architecture(closed_blocks_of(unet, row)))[b], masked[b])


def test_a_closed_layer_is_closed_in_the_copies_of_its_transformer():
    whole = PrunableUNet2DConditionModel.from_unet(small_stock_unet("sdxl"))
    unet = whole.with_architecture({"mid_block.attentions.0": 3}, copy_init="same")
    layer = "mid_block.attentions.0.transformer_blocks.1"
    mask = torch.tensor([[block != layer for block in unet.kept_blocks]] * 3)
    assert torch.equal(run(unet, block_mask=mask), run(unet.with_architecture({layer: 0})))


def test_a_closed_branch_that_overflows_does_no_harm(unet):
    column = unet.kept_blocks.index("mid_block.resnets.0")
    with torch.no_grad():
        unet.mid_block.resnets[0].conv2.weight.fill_(torch.inf)
    mask = torch.ones(3, 38, dtype=torch.bool)
    mask[:, column] = False
    assert run(unet, block_mask=mask).isfinite().all()


def test_masks_leave_no_trace(unet):
    before = run(unet)
    run(unet, block_mask=random_mask(unet, 3))
    assert torch.equal(run(unet), before)
    with pytest.raises(RuntimeError):
        unet(torch.randn(3, 5, 8, 8), 1, torch.randn(3, 5, 12), block_mask=random_mask(unet, 3))
    assert torch.equal(run(unet), before)


def test_masks_of_the_wrong_shape_are_refused(unet):
    with pytest.raises(AssertionError, match=r"block mask \(3, 37\) for a batch of 3 and 38 kept blocks"):
        run(unet, block_mask=torch.ones(3, 37, dtype=torch.bool))


def test_open_masks_are_the_stock_unet_under_autocast(unet):
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(unet, block_mask=random_mask(unet, 0, open_prob=1.1)), run(unet))


def test_blocks_are_still_the_stock_classes_and_names(unet):
    assert isinstance(unet.down_blocks[0].resnets[0], ResnetBlock2D)
    assert unet.state_dict().keys() == small_stock_unet().state_dict().keys()


# ---- gradients


def gradients(unet, checkpointing: bool, masks: list[torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """Gradients of the summed squares of several forwards, all of them run before the one backward."""
    unet.train().zero_grad(set_to_none=True)
    unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
    outputs = [unet(**small_inputs(unet), block_mask=m).sample for m in masks]
    sum(y.square().sum() for y in outputs).backward()
    return {name: p.grad for name, p in unet.named_parameters()}


def test_gradient_checkpointing_gives_equal_gradients(stock):
    unet = PrunableUNet2DConditionModel.from_unet(stock)
    masks = [random_mask(unet, 4), random_mask(unet, 5), None]
    plain, checkpointed = gradients(unet, False, masks), gradients(unet, True, masks)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_gradient_checkpointing_takes_a_function_of_the_users(unet):
    calls = []

    def function(block, *args):
        calls.append(block)
        return torch.utils.checkpoint.checkpoint(block.__call__, *args, use_reentrant=False)

    plain = gradients(unet, False, [random_mask(unet, 6)])
    unet.enable_gradient_checkpointing(function)
    unet.zero_grad(set_to_none=True)
    unet(**small_inputs(unet), block_mask=random_mask(unet, 6)).sample.square().sum().backward()
    assert calls and all(torch.equal(plain[n], p.grad) for n, p in unet.named_parameters())


def test_every_parameter_gets_a_gradient_whatever_the_mask(unet):
    """So that distributed training needs no search for unused parameters."""
    grads = gradients(unet, False, [torch.zeros(3, 38, dtype=torch.bool)])
    assert all(grad is not None for grad in grads.values())
    assert all(grad.isfinite().all() for grad in grads.values())


def test_a_closed_sample_gives_its_block_no_gradient(unet):
    mask = torch.ones(3, 38, dtype=torch.bool)
    mask[:, unet.kept_blocks.index("mid_block.attentions.0")] = False
    grads = gradients(unet, True, [mask])
    inside = [grad for name, grad in grads.items() if name.startswith("mid_block.attentions.0.")]
    assert inside and not any(grad.any() for grad in inside)


# ---- torch.compile


def count_graphs(function, calls) -> int:
    """How many graphs torch.compile makes of a function over these calls; results must not change."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    with torch.no_grad():
        for arguments in calls:
            assert torch.equal(compiled(**arguments)[0], function(**arguments)[0])
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_one_graph_for_any_mask():
    unet = PrunableUNet2DConditionModel.from_unet(small_unet().eval())
    inputs = {**small_inputs(unet), "return_dict": False}
    assert count_graphs(unet, [{**inputs, "block_mask": random_mask(unet, seed)} for seed in range(3)]) == 1


@pytest.mark.slow
def test_one_graph_for_any_mask_of_a_unet_with_everything():
    whole = PrunableUNet2DConditionModel.from_unet(small_stock_unet("sdxl"))
    architecture = {"mid_block.attentions.0": 2, "down_blocks.1.resnets.0": 0, "down_blocks.2.attentions.1": 0}
    unet = whole.with_architecture(architecture)
    inputs = {**small_inputs(unet), "return_dict": False}
    assert count_graphs(unet, [{**inputs, "block_mask": random_mask(unet, seed)} for seed in range(3)]) == 1


@pytest.mark.slow
def test_inductor_paints_what_eager_paints_for_any_mask():
    unet = PrunableUNet2DConditionModel.from_unet(small_pipeline().unet)
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True)
    for seed in range(2):
        mask = random_mask(unet, seed)
        with torch.no_grad():
            y = compiled(**small_inputs(unet), block_mask=mask).sample
        torch.testing.assert_close(y, run(unet, block_mask=mask), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_masked_training_has_the_gradients_of_eager(unet, checkpointing):
    torch._dynamo.reset()
    mask = random_mask(unet, 7)
    plain = gradients(unet, checkpointing, [mask])
    unet.zero_grad(set_to_none=True)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    compiled(**small_inputs(unet), block_mask=mask).sample.square().sum().backward()
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-3, atol=1e-4, msg=name)
