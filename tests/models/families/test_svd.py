"""Stable Video Diffusion's network: time apart from space, each block removable, copied and masked."""

import copy
import json

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image

from scripts.random_svd import FRAMES, small_svd, small_svd_pipeline
from slimstep.distill.recovery import Recovery
from slimstep.distill.steps import StepDistillation
from slimstep.distill.teaching import StepSchedule
from slimstep.eval.config import LatencyConfig
from slimstep.models.cost import count_gflops, count_parameters
from slimstep.models.families.svd.network import PrunableUNetSpatioTemporalConditionModel
from slimstep.models.family import denoiser_of
from slimstep.models.flow import stretched
from slimstep.models.guidance import guided
from slimstep.models.memory import training_need
from slimstep.models.noise_schedule import add_noise, schedule_of, target_of
from slimstep.models.reference import VIDEO_CONFIGS
from slimstep.prune.latency import latency_table
from slimstep.prune.stochastic_depth import StochasticDepth
from tests.jobs import run_job
from tests.tiny import slow

BATCH = 2
ATTENTION = "down_blocks.0.attentions.0"


@pytest.fixture(scope="module")
def stock():
    return small_svd()


@pytest.fixture(scope="module")
def unet(stock):
    return PrunableUNetSpatioTemporalConditionModel.from_unet(stock)


def inputs(batch: int = BATCH) -> dict:
    draw = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(batch, FRAMES, 8, 8, 8, generator=draw),
        "timestep": torch.tensor([0.3, -0.7])[:batch],
        "encoder_hidden_states": torch.randn(batch, 1, 16, generator=draw),
        "added_time_ids": torch.rand(batch, 3, generator=draw),
    }


def run(network, **options):
    with torch.no_grad():
        return network(**{**inputs(), **options}, return_dict=False)[0]


@pytest.mark.parametrize("layers", [1, 2])
def test_an_unpruned_network_is_the_stock_one_bit_for_bit(layers):
    stock = small_svd(layers)
    unet = PrunableUNetSpatioTemporalConditionModel.from_unet(stock)
    assert unet.state_dict().keys() == stock.state_dict().keys() and count_parameters(unet) == count_parameters(stock)
    assert torch.equal(run(unet), run(stock))
    open_mask = torch.ones(BATCH, len(unet.kept_blocks), dtype=torch.bool)
    assert torch.equal(run(unet, block_mask=open_mask), run(stock))


def test_blocks_are_the_module_paths_in_order_of_execution_and_time_is_apart_from_space(unet):
    ran = []
    handles = [
        unet.get_submodule(block).register_forward_pre_hook(lambda *_, block=block: ran.append(block))
        for block in unet.blocks
    ]
    run(unet)
    for handle in handles:
        handle.remove()
    assert tuple(ran) == unet.blocks
    resnets, attentions = 3 + 2 + 6, 2 + 1 + 4
    assert sum("spatial_res_block" in block for block in unet.blocks) == resnets
    assert sum("temporal_res_block" in block for block in unet.blocks) == resnets
    assert sum(".temporal_transformer_blocks." in block for block in unet.blocks) == attentions
    assert unet.parents[f"{ATTENTION}.temporal_transformer_blocks.0"] == ATTENTION


@pytest.mark.parametrize("every", [6, *slow(1)])
def test_each_block_can_go_and_leaves_a_subset_of_the_stock_weights(stock, unet, every):
    full, whole = stock.state_dict(), run(unet)
    for block in unet.blocks[::every]:
        pruned = unet.with_architecture({block: 0})
        kept = pruned.state_dict()
        assert kept.keys() < full.keys() and all(torch.equal(kept[key], full[key]) for key in kept)
        assert not torch.equal(run(pruned), whole), f"removing {block} changes nothing"
        assert not any(key.startswith(f"{block}.") for key in kept if "conv_shortcut" not in key)


def test_without_its_temporal_half_a_layer_is_its_spatial_half(unet):
    """The blend goes, too: in a network that is blended of what is spatial alone nothing depends on other frames."""
    time = [block for block in unet.blocks if ".temporal_" in block]
    still = unet.with_architecture(dict.fromkeys(time, 0))
    assert not any("time_mixer" in key or "temporal" in key or "time_pos" in key for key in still.state_dict())
    other = inputs()["sample"].clone()
    other[:, 1:] = 0
    assert torch.equal(run(still)[:, 0], run(still, sample=other)[:, 0])
    assert not torch.equal(run(unet)[:, 0], run(unet, sample=other)[:, 0])
    mixed = copy.deepcopy(unet)
    with torch.no_grad():
        for name, parameter in mixed.named_parameters():
            if name.endswith("mix_factor"):
                parameter.fill_(100.0)  # α = 1 to rounding
    torch.testing.assert_close(run(mixed), run(still))


def test_a_layer_keeps_the_blend_that_another_needs():
    two = PrunableUNetSpatioTemporalConditionModel.from_unet(small_svd(layers=2))
    first, second = (f"{ATTENTION}.temporal_transformer_blocks.{k}" for k in range(2))
    assert f"{ATTENTION}.time_mixer.mix_factor" in two.with_architecture({first: 0}).state_dict()
    assert f"{ATTENTION}.time_mixer.mix_factor" not in two.with_architecture({first: 0, second: 0}).state_dict()


def test_closed_blocks_are_the_pruned_network_in_every_row_of_a_mixed_batch(unet):
    draw = torch.Generator().manual_seed(3)
    for _ in range(4):
        mask = torch.rand(BATCH, len(unet.kept_blocks), generator=draw) < 0.6
        masked = run(unet, block_mask=mask)
        for b, row in enumerate(mask.tolist()):
            closed = {block: 0 for block, is_open in zip(unet.kept_blocks, row, strict=True) if not is_open}
            assert torch.equal(run(unet.with_architecture(closed))[b], masked[b])


@pytest.mark.parametrize("every", [7, *slow(1)])
def test_each_block_alone_closed_is_the_network_without_it(unet, every):
    for column, block in list(enumerate(unet.blocks))[::every]:
        mask = torch.ones(BATCH, len(unet.blocks), dtype=torch.bool)
        mask[1, column] = False
        assert torch.equal(run(unet, block_mask=mask)[1], run(unet.with_architecture({block: 0}))[1]), block


def test_masks_of_layers_follow_their_own_blend():
    two = PrunableUNetSpatioTemporalConditionModel.from_unet(small_svd(layers=2))
    for block in (block for block in two.blocks if f"{ATTENTION}.temporal" in block):
        mask = torch.tensor([[other != block for other in two.kept_blocks]] * BATCH)
        assert torch.equal(run(two, block_mask=mask), run(two.with_architecture({block: 0})))


def test_zero_copies_leave_the_function_unchanged_and_same_ones_do_not(unet):
    deeper = unet.with_architecture(dict.fromkeys(unet.copyable_blocks, 2))
    assert torch.equal(run(deeper), run(unet)) and count_parameters(deeper) > count_parameters(unet)
    for block in ("mid_block.resnets.0.temporal_res_block", f"{ATTENTION}.temporal_transformer_blocks.0"):
        assert block in unet.copyable_blocks
        assert not torch.equal(run(unet.with_architecture({block: 2}, copy_init="same")), run(unet))


def test_removed_then_added_is_the_start(stock, unet):
    emptied = unet.with_architecture(dict.fromkeys(unet.blocks, 0))
    assert emptied.kept_blocks == () and run(emptied).isfinite().all()
    back = emptied.with_architecture(dict.fromkeys(unet.blocks, 1), source=stock)
    assert back.architecture == {} and torch.equal(run(back), run(stock))
    time = "mid_block.resnets.0.temporal_res_block"
    with pytest.raises(ValueError, match=rf"no weights for \['{time}'\].*source="):
        unet.with_architecture({time: 0}).with_architecture({time: 1})


def test_the_innermost_level_can_go_with_the_middle(unet):
    assert tuple(unet.levels) == ("down_blocks.2",)
    shallow = unet.with_architecture({"down_blocks.2": 0})
    assert not any(block.startswith(("down_blocks.2.", "mid_block.", "up_blocks.0.")) for block in shallow.kept_blocks)
    assert run(shallow).shape == run(unet).shape and run(shallow).isfinite().all()


def test_a_pruned_network_is_saved_and_loaded(unet, tmp_path):
    table = {
        "mid_block.resnets.0.temporal_res_block": 0, f"{ATTENTION}.temporal_transformer_blocks.0": 0,
        "up_blocks.2.attentions.1": 0, "down_blocks.1.resnets.0.spatial_res_block": 0,
        "up_blocks.0.resnets.1.spatial_res_block": 0, "mid_block.resnets.1.temporal_res_block": 2,
    }  # fmt: skip
    pruned = unet.with_architecture(table)
    pruned.save_pretrained(tmp_path)
    loaded = PrunableUNetSpatioTemporalConditionModel.from_pretrained(tmp_path).eval()
    assert loaded.architecture == pruned.architecture and torch.equal(run(loaded), run(pruned))


def test_gradient_checkpointing_gives_equal_gradients(unet):
    """Of several forwards with masks of their own, before the one backward."""
    draw, trained = torch.Generator().manual_seed(4), copy.deepcopy(unet).train()
    masks = [torch.rand(BATCH, len(unet.kept_blocks), generator=draw) < 0.6, None]

    def gradients():
        trained.zero_grad(set_to_none=True)
        sum(trained(**inputs(), block_mask=mask).sample.square().sum() for mask in masks).backward()
        return {name: p.grad for name, p in trained.named_parameters()}

    plain = gradients()
    trained.enable_gradient_checkpointing()
    checkpointed = gradients()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_blocks_can_be_narrower_and_compute_in_int8(unet):
    narrow = unet.with_architecture({
        f"{ATTENTION}.temporal_transformer_blocks.0": {"widths": {"ff": 0.5}},
        f"{ATTENTION}.transformer_blocks.0": {"widths": {"attn1": 0.5}},
        "mid_block.resnets.0.spatial_res_block": {"widths": {"channels": 0.5}},
    })  # fmt: skip
    assert count_parameters(narrow) < count_parameters(unet) and run(narrow).isfinite().all()
    block, part = f"{ATTENTION}.temporal_transformer_blocks.0", "ff"
    with unet.with_narrower(block, part, 0.5):
        zeroed = run(unet)
    torch.testing.assert_close(zeroed, run(unet.with_architecture({block: {"widths": {part: 0.5}}})))


def test_it_is_called_with_frames_behind_channels(unet):
    denoiser = denoiser_of(unet)
    assert denoiser.sample_shape == (4, FRAMES, 8, 8)
    x_t, t_B, cond = denoiser.example(unet, BATCH, generator=torch.Generator().manual_seed(0))
    ours = denoiser(unet, x_t, t_B, cond)
    still = cond.tensors["image_latents"][:, None].repeat(1, FRAMES, 1, 1, 1)
    sample = torch.cat([x_t.permute(0, 2, 1, 3, 4), still], dim=2)
    conditions = {"encoder_hidden_states": cond.tensors["image"], "added_time_ids": cond.tensors["time_ids"]}
    own = run(unet, sample=sample, timestep=t_B, **conditions)
    assert torch.equal(ours, own.permute(0, 2, 1, 3, 4)) and ours.shape == x_t.shape


def test_its_guidance_scale_grows_over_the_frames_as_in_the_stock_pipeline(unet):
    """From 1 to the scale that is asked for: the pipeline's min_guidance_scale and max_guidance_scale."""
    denoiser = denoiser_of(unet)
    x_t, t_B, cond = denoiser.example(unet, BATCH, generator=torch.Generator().manual_seed(0))
    uncond = cond.rows([0]).map(torch.zeros_like)
    with torch.no_grad():
        ours, plain = guided(denoiser, unet, x_t, t_B, cond, uncond, 3.0)
        empty = denoiser(unet, x_t, t_B, uncond.expand(BATCH))
    scale_F11 = torch.linspace(1.0, 3.0, FRAMES)[:, None, None]
    torch.testing.assert_close(ours, empty + scale_F11 * (plain - empty), rtol=1e-4, atol=1e-4)


def test_it_is_counted(unet):
    gone = unet.with_architecture({f"{ATTENTION}.temporal_transformer_blocks.0": 0})
    assert count_gflops(unet) > count_gflops(gone) > 0 and training_need(unet).step > 0


def test_a_latency_table_has_an_entry_for_time_and_one_for_space(unet):
    config = LatencyConfig(iterations=3, warmup=1, additive_samples=2, seconds=60)
    table = latency_table(unet, config, torch.device("cpu"))
    assert tuple(table["sites"]) == unet.blocks and all(entry["ms"] > 0 for entry in table["sites"].values())
    assert table["additive_error"]["n"] == 2


def test_a_table_is_made_by_its_job(monkeypatch, tmp_path):
    monkeypatch.setitem(VIDEO_CONFIGS, "svd_xt", {
        **dict(small_svd().config), "block_out_channels": (32, 64), "num_attention_heads": (2, 4),
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    })  # fmt: skip
    quick = ["latency.iterations=3", "latency.warmup=1", "latency.additive_samples=2"]
    done = run_job("+experiment=latency_table", "model=svd_xt_random", f"root={tmp_path}", "name=table", *quick)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "table/latency.json").read_text())
    assert "mid_block.resnets.0.temporal_res_block" in table["sites"]


# ---- in a pipeline


def frames(pipeline):
    image = Image.fromarray((torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy())
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
    return pipeline(image, generator=torch.Generator().manual_seed(0), **options).frames


def test_stock_pipelines_draw_with_a_pruned_network_and_load_its_export(unet, tmp_path):
    """Diffusers' own classes, with the class that travels in the folder."""
    pipeline = small_svd_pipeline()
    whole = frames(pipeline)
    pipeline.register_modules(unet=unet)
    assert torch.equal(frames(pipeline), whole)
    slim = unet.with_architecture({"mid_block.resnets.0.temporal_res_block": 0, "up_blocks.2.attentions.0": 0})
    pipeline.register_modules(unet=slim)
    drawn = frames(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = StableVideoDiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(frames(loaded), drawn) and not torch.equal(drawn, whole)
    assert type(loaded.unet).__name__ == "PrunableUNetSpatioTemporalConditionModel"


@pytest.mark.parametrize("kind", [StochasticDepth, Recovery, StepDistillation])
def test_objectives_train_it_on_videos(unet, kind):
    """Masks for each sample's frames, features of each level, and the steps of its own scheduler's students."""
    scheduler = small_svd_pipeline().scheduler
    schedule, denoiser, student = schedule_of(scheduler), denoiser_of(unet), copy.deepcopy(unet)
    latents, _, cond = denoiser.example(unet, BATCH, generator=torch.Generator().manual_seed(0))
    uncond = cond.rows([0]).map(torch.zeros_like)
    students = stretched(scheduler, 2, None)
    own = {
        StochasticDepth: {"skip_prob": {"resnet": 0.3, "attention": 0.3}},
        StepDistillation: {"step_schedule": StepSchedule(scheduler, 4, students, 2)},
    }.get(kind, {})
    teacher = copy.deepcopy(unet).requires_grad_(False)
    objective = kind(denoiser=denoiser, schedule=schedule, uncond=uncond, teacher=teacher, **own)
    batch = {"latents": latents, **cond.tensors, "progress": 0.5}
    loss, _ = objective(student, batch, torch.Generator().manual_seed(0))
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values())
    assert any(g.abs().sum() > 0 for name, g in gradients.items() if "temporal" in name)


def test_its_schedulers_times_are_edms(unet):
    schedule = schedule_of(small_svd_pipeline().scheduler)
    denoiser = denoiser_of(unet)
    x0, _, cond = denoiser.example(unet, BATCH, generator=torch.Generator().manual_seed(0))
    t_B = schedule.sample_times(BATCH, torch.Generator().manual_seed(0))
    level, noise = schedule.alpha_sigma(t_B), torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    target = target_of(x0, noise, level, schedule.prediction_type)
    trained = copy.deepcopy(unet)
    loss = (denoiser(trained, add_noise(x0, noise, level), t_B, cond) - target).square().mean()
    loss.backward()
    assert loss.isfinite() and trained.conv_in.weight.grad.abs().sum() > 0
    v = target_of(x0, noise, level, "v_prediction")
    torch.testing.assert_close(target, v, rtol=1e-4, atol=1e-4)
