"""Unconditional DDPMs: the prunable UNet2DModel, its export, its sampling, its training."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from slimstep.data.cache import cache_pairs
from slimstep.distill.prediction import Denoising
from slimstep.distill.recovery import Recovery
from slimstep.distill.steps import StepDistillation
from slimstep.distill.teaching import Draw, StepSchedule, teacher_target
from slimstep.engine.seeding import generator
from slimstep.eval.sampling import Sampler
from slimstep.models.conditioning import Conditioning
from slimstep.models.cost import count_gflops
from slimstep.models.families.ddpm.network import PrunableUNet2DModel
from slimstep.models.families.ddpm.stock import stock_config, to_stock
from slimstep.models.family import denoiser_of
from slimstep.models.memory import training_need
from slimstep.models.noise_schedule import add_noise, ddim_step, pred_of, schedule_of
from slimstep.models.pipeline import check_pipeline, export_pipeline, load_pipeline, with_unet
from slimstep.prune.stochastic_depth import StochasticDepth

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
    equivalent = stock_config(unet)
    assert not equivalent.obstacles
    stock = to_stock(unet)
    assert type(stock) is UNet2DModel and torch.equal(run(stock), run(unet))
    again = UNet2DModel.from_config(json.loads(json.dumps(equivalent.config)))
    assert again.num_parameters() == stock.num_parameters() == unet.num_parameters()


@pytest.mark.parametrize("name", FITS_NOT)
def test_what_no_stock_unet_expresses_is_named(name):
    architecture, reason = FITS_NOT[name]
    equivalent = stock_config(pruned(architecture))
    assert equivalent.config is None and any(reason.replace(" .", " (") in o for o in equivalent.obstacles), equivalent
    with pytest.raises(ValueError, match="no stock UNet2DModel is this network"):
        to_stock(pruned(architecture))


@pytest.mark.parametrize("which", ["downsample_type", "upsample_type"])
def test_levels_that_resample_by_resnets_keep_their_attention(which):
    unet = small_unet(**{which: "resnet"}).with_architecture({f"up_blocks.0.attentions.{i}": 0 for i in range(3)})
    assert any("resample in another way" in obstacle for obstacle in stock_config(unet).obstacles)


# ---- the pipeline


def small_pipeline(scheduler: type = DDPMScheduler) -> DDPMPipeline:
    pipeline = DDPMPipeline(unet=small_stock_unet(), scheduler=scheduler(clip_sample=True))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("ddpm")
    small_pipeline().save_pretrained(place)
    return str(place)


@pytest.fixture
def pipeline(folder) -> DiffusionPipeline:
    return load_pipeline(folder)


def test_a_folder_loads_around_a_prunable_unet(folder, pipeline):
    assert type(pipeline) is DDPMPipeline and type(pipeline.unet) is PrunableUNet2DModel
    assert torch.equal(run(pipeline.unet), run(small_stock_unet()))
    assert type(load_pipeline(folder, scheduler="ddim").scheduler) is DDIMScheduler


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("model_index.json", {"_class_name": "LDMPipeline"}, "is a LDMPipeline with a UNet2DModel, of which no family"),
        ("unet/config.json", {"num_class_embeds": 4}, "is conditioned on classes"),
        ("unet/config.json", {"out_channels": 6}, "in_channels=3 and out_channels=6; only one of RGB images"),
    ],
)
def test_what_is_no_unconditional_model_of_pixels_is_refused_by_name(folder, tmp_path, part, changes, reason):
    small_pipeline().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / part).read_text())
    (tmp_path / part).write_text(json.dumps(fields | changes))
    with pytest.raises(ValueError, match=reason):
        check_pipeline(tmp_path)


@pytest.mark.parametrize(("architecture", "is_stock"), [({MID[1]: 0}, True), ({MID[0]: 0}, False)])
def test_an_export_loads_in_diffusers_and_here(pipeline, tmp_path, architecture, is_stock):
    student = with_unet(pipeline, pipeline.unet.with_architecture(architecture))
    export = export_pipeline(student, tmp_path / "export")
    assert export.is_stock is is_stock
    stock = DiffusionPipeline.from_pretrained(tmp_path / "export", trust_remote_code=not is_stock)
    assert (type(stock.unet) is UNet2DModel) is is_stock
    assert torch.equal(run(stock.unet), run(student.unet))
    assert torch.equal(run(load_pipeline(tmp_path / "export").unet), run(student.unet))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_sampling_is_the_stock_pipelines(scheduler):
    stock = small_pipeline(scheduler)
    sampler, prompts = Sampler(stock, steps=4, guidance_scale=1.0, seed=5), ["x", "y", "z"]
    noise = [generator("sample", 5, i) for i in range(3)]
    theirs = stock(3, generator=noise, num_inference_steps=4, output_type="np").images
    # The stock pipeline goes on with the generators that made its first noise.
    options = [generator("sample", 5, i) for i in range(3)]
    first = torch.stack([torch.randn(3, 16, 16, generator=draw) for draw in options])
    latents = sampler.latents(stock.unet, sampler.encode(prompts), first, generators=options)
    ours = sampler.decode(latents).permute(0, 2, 3, 1)
    assert torch.equal(ours, (torch.from_numpy(theirs) * 255).round().to(torch.uint8))
    assert torch.equal(first, torch.stack([sampler.noise(i) for i in range(3)]))
    if scheduler is DDIMScheduler:
        assert torch.equal(sampler.images(stock.unet, prompts, [0, 1, 2]).permute(0, 2, 3, 1), ours)


def test_a_masked_image_is_the_pruned_networks(pipeline):
    sampler, unet = Sampler(pipeline, steps=2, guidance_scale=1.0), pipeline.unet
    mask_BN = torch.ones(2, len(unet.kept_blocks), dtype=torch.bool)
    mask_BN[1, unet.blocks.index(MID[1])] = False
    whole, masked = sampler.images(unet, ["x"], [0, 0], mask_BN)
    pruned = sampler.images(unet.with_architecture({MID[1]: 0}), ["x"], [0, 0])[0]
    assert torch.equal(masked, pruned) and torch.equal(whole, sampler.images(unet, ["x"], [0, 0])[0])


def test_guidance_of_an_unconditional_model_is_refused(pipeline):
    with pytest.raises(ValueError, match="guidance_scale=2.5: DDPMPipeline has no guidance; set 1"):
        Sampler(pipeline, steps=2, guidance_scale=2.5)


class Pictures:
    """Six pairs of noise."""

    fingerprint, captions = "six", tuple("abcdef")

    def __len__(self):
        return 6

    def check_broken(self, broken, of):
        pass

    def __getitem__(self, i):
        draw = torch.Generator().manual_seed(i)
        return {"image": torch.randint(256, (3, 16, 16), generator=draw, dtype=torch.uint8), "caption": "abcdef"[i]}


def test_a_cache_of_pixels_holds_images_and_nothing_of_captions(pipeline, tmp_path):
    cached = cache_pairs(Pictures(), pipeline, tmp_path)
    assert cached[2].keys() == {"latents", "index"} and cached.unconditional == Conditioning()
    assert torch.equal(((cached[2]["latents"] + 1) * 127.5).round().to(torch.uint8), Pictures()[2]["image"])


def test_it_is_counted(unet):
    assert count_gflops(unet) > count_gflops(unet.with_architecture({MID[1]: 0})) > 0
    assert training_need(unet).step > 0


# ---- training


def batch() -> dict:
    return {"latents": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3)), "progress": 0.5}


def given(unet, prediction_type: str = "epsilon") -> dict:
    schedule = schedule_of(trailing(prediction_type))
    return {"denoiser": denoiser_of(unet, prediction_type), "schedule": schedule, "uncond": Conditioning(),
            "teacher": small_unet()}  # fmt: skip


def trailing(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing")


def step_schedule(teacher_steps: int, steps: int, prediction_type: str = "v_prediction") -> StepSchedule:
    return StepSchedule(trailing(prediction_type), teacher_steps, trailing(prediction_type), steps)


OBJECTIVES = {
    "stochastic depth": lambda **options: StochasticDepth(**options, skip_prob={"resnet": 0.2, "attention": 0.2},
                                                     teacher_weight=0.5),
    "denoising": lambda **options: Denoising(**options),
    "recovery": lambda **options: Recovery(**options),
    "steps": lambda **options: StepDistillation(**options, step_schedule=step_schedule(8, 4), guided_share=0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_training_step_moves_every_block(name):
    unet = small_unet().train()
    prediction_type = "v_prediction" if name == "steps" else "epsilon"
    loss, metrics = OBJECTIVES[name](**given(unet, prediction_type))(unet, batch(), torch.Generator().manual_seed(0))
    assert loss.isfinite() and loss > 0 and all(value.isfinite() for value in metrics.values())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_one_step_to_the_target_lands_where_the_teachers_two_steps_land(unet, prediction_type):
    options = given(unet, prediction_type)
    schedule, denoiser, bounds_NK = (
        options["schedule"],
        options["denoiser"],
        step_schedule(8, 4, prediction_type).bounds(options["schedule"]),
    )
    x0, noise = (torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    start = Draw(x0, noise, add_noise(x0, noise, schedule.alpha_sigma(bounds_NK[:, 0])), bounds_NK, Conditioning())
    target = teacher_target(denoiser, unet, schedule, start, Conditioning(), torch.zeros(0))
    z, levels = start.z_BCHW, [schedule.alpha_sigma(t_B) for t_B in bounds_NK.T]
    with torch.no_grad():
        for t_B, here, there in zip(bounds_NK.T, levels[:-1], levels[1:], strict=False):
            z = ddim_step(denoiser(unet, z, t_B, Conditioning()), z, here, there, prediction_type)
    pred = pred_of(target.x0_BCHW, start.z_BCHW, levels[0], prediction_type)
    landed = ddim_step(pred, start.z_BCHW, levels[0], levels[-1], prediction_type)
    torch.testing.assert_close(landed, z, rtol=1e-3, atol=1e-3)
    assert (target.gap_B > 0).all()
