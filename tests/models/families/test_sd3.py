"""Stable Diffusion 3 and 3.5: the prunable transformer, its export as stock, its sampling, its training."""

import json
import re

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from scripts.random_transformers import POOLED, TEXT_WIDTH, small_sd3, small_sd3_pipeline
from slimstep.data.cache import cache_pairs
from slimstep.distill.prediction import Denoising
from slimstep.distill.recovery import Recovery, features_of
from slimstep.distill.steps import StepDistillation
from slimstep.distill.teaching import Draw, StepSchedule, teacher_target
from slimstep.eval.sampling import Sampler
from slimstep.models.card import Origin
from slimstep.models.conditioning import Conditioning
from slimstep.models.cost import count_gflops
from slimstep.models.families.transformer.networks.sd3 import PrunableSD3Transformer2DModel
from slimstep.models.families.transformer.sd3 import FAMILY
from slimstep.models.families.transformer.stock import stock_config, to_stock
from slimstep.models.family import denoiser_of, family_of, schedule_for
from slimstep.models.memory import training_need
from slimstep.models.noise_schedule import add_noise, ddim_step, pred_of
from slimstep.models.pipeline import check_pipeline, export_pipeline, load_pipeline, with_unet
from slimstep.prune.decoder import choose_channels, pruned_vae
from slimstep.prune.stochastic_depth import StochasticDepth

VERSIONS = {"3": {}, "3.5": {"dual_attention_layers": (0, 1, 3), "qk_norm": "rms_norm"}}
BLOCKS = tuple(f"transformer_blocks.{i}" for i in range(5))
FIRST, *_, LAST = BLOCKS


@pytest.fixture(scope="module", params=VERSIONS)
def stock(request) -> SD3Transformer2DModel:
    return small_sd3(**VERSIONS[request.param])


@pytest.fixture(scope="module")
def network(stock) -> PrunableSD3Transformer2DModel:
    return PrunableSD3Transformer2DModel.from_unet(stock)


def inputs(rows: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    text, pooled = torch.randn(rows, 7, TEXT_WIDTH, generator=draw), torch.randn(rows, POOLED, generator=draw)
    x_t, t_B = torch.randn(rows, 4, 8, 8, generator=draw), 1000 * torch.rand(rows, generator=draw)
    return {"hidden_states": x_t, "timestep": t_B, "encoder_hidden_states": text, "pooled_projections": pooled}


def run(network, **options) -> torch.Tensor:
    with torch.no_grad():
        return network(**inputs(), **options, return_dict=False)[0]


# ---- the network


def test_open_masks_are_the_stock_transformer(network, stock):
    assert network.blocks == network.kept_blocks == BLOCKS and {*network.kinds.values()} == {"transformer"}
    assert torch.equal(run(network), run(stock))
    assert torch.equal(run(network, block_mask=torch.ones(3, 5, dtype=torch.bool)), run(stock))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_closed_mask_is_the_pruned_transformer_for_each_sample_alone(network, seed):
    mask_BN = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask_BN[0] = torch.tensor([True, True, True, False, False])  # the last, too
    masked = run(network, block_mask=mask_BN)
    for row, open_N in enumerate(mask_BN.tolist()):
        closed = [block for block, is_open in zip(BLOCKS, open_N, strict=True) if not is_open]
        assert torch.equal(run(network.with_architecture(dict.fromkeys(closed, 0)))[row], masked[row])


def test_every_block_counts(network, stock):
    """Else none of the laws here says anything."""
    for block in BLOCKS:
        assert (run(network.with_architecture({block: 0})) - run(stock)).abs().max() > 1e-2


def test_a_mask_is_over_the_blocks_that_are_kept(network):
    pruned = network.with_architecture({FIRST: 0})
    assert pruned.kept_blocks == BLOCKS[1:]
    with pytest.raises(AssertionError, match=re.escape("block mask (3, 5) for a batch of 3 and 4 kept blocks")):
        run(pruned, block_mask=torch.ones(3, 5, dtype=torch.bool))


def test_a_fresh_copy_changes_nothing_and_the_last_block_has_none(network):
    copied = network.with_architecture(dict.fromkeys(network.copyable_blocks, 2))
    assert torch.equal(run(copied), run(network)) and network.copyable_blocks == BLOCKS[:-1]
    assert not torch.equal(run(network.with_architecture({FIRST: 2}, copy_init="same")), run(network))
    with pytest.raises(ValueError, match=f"copies {LAST}, whose text nothing would give on; these can be copied"):
        network.with_architecture({LAST: 2})


def test_removed_blocks_are_put_back(network):
    pruned = network.with_architecture({BLOCKS[1]: 0, LAST: 0})
    again = pruned.with_architecture({BLOCKS[1]: 1, LAST: 1}, source=network)
    assert torch.equal(run(again), run(network))
    with pytest.raises(ValueError, match=f"no weights for .*'{LAST}'"):
        pruned.with_architecture({LAST: 1})


def test_the_new_last_block_computes_no_text(network):
    pruned, text = network.with_architecture({LAST: 0}), "ff_context"
    assert text in {name.split(".")[2] for name in pruned.state_dict() if name.startswith(BLOCKS[2])}
    assert text not in {name.split(".")[2] for name in pruned.state_dict() if name.startswith(BLOCKS[3])}
    with pytest.raises(ValueError, match="is impossible at"):
        PrunableSD3Transformer2DModel.from_unet(network, skip_rule={FIRST: "drop_skip"})


def test_a_mask_survives_gradient_checkpointing(stock):
    network = PrunableSD3Transformer2DModel.from_unet(stock).train()
    mask_BN = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    grads = []
    for _ in range(2):
        network.zero_grad()
        network(**inputs(), block_mask=mask_BN).sample.square().mean().backward()
        grads.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        network.enable_gradient_checkpointing()
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.slow  # some 20 s of compilation
def test_all_masks_run_in_one_compiled_graph(network):
    compiled = torch.compile(network, fullgraph=True)
    masks = [torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in range(3)]
    with torch.compiler.set_stance("default"):
        first = run(compiled, block_mask=masks[0])
    torch.testing.assert_close(first, run(network, block_mask=masks[0]))
    with torch.compiler.set_stance("fail_on_recompile"):
        for mask_BN in masks:
            torch.testing.assert_close(run(compiled, block_mask=mask_BN), run(network, block_mask=mask_BN))


# ---- as a stock transformer

ARCHITECTURES = {
    "nothing": {},
    "the first": {FIRST: 0},
    "the middle": {BLOCKS[2]: 0, BLOCKS[3]: 0},
    "the last": {LAST: 0},
    "the last two": {BLOCKS[3]: 0, LAST: 0},
    "all but one": dict.fromkeys(BLOCKS[1:], 0),
    "copies": {BLOCKS[1]: 3, BLOCKS[2]: 0},
    "copies of the new last": {BLOCKS[3]: 2, LAST: 0},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_stock_transformer_has_the_pruned_ones_output(network, name):
    pruned = network.with_architecture(ARCHITECTURES[name], copy_init="same")
    made = to_stock(pruned)
    assert type(made) is SD3Transformer2DModel and torch.equal(run(made), run(pruned))
    again = SD3Transformer2DModel.from_config(json.loads(json.dumps(stock_config(pruned))))
    again.load_state_dict(made.state_dict())
    assert torch.equal(run(again.eval()), run(pruned))


def test_layers_with_two_attentions_are_renumbered():
    network = PrunableSD3Transformer2DModel.from_unet(small_sd3(**VERSIONS["3.5"]))
    fields = stock_config(network.with_architecture({FIRST: 0, BLOCKS[1]: 2}))
    assert fields["num_layers"] == 5 and fields["dual_attention_layers"] == [0, 1, 3]


# ---- the pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("sd3")
    small_sd3_pipeline().save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def pipeline(folder) -> DiffusionPipeline:
    return load_pipeline(folder)


def test_a_folder_loads_around_a_prunable_transformer(pipeline):
    assert type(pipeline) is StableDiffusion3Pipeline and type(pipeline.transformer) is PrunableSD3Transformer2DModel
    assert family_of(pipeline) is FAMILY and torch.equal(run(pipeline.transformer), run(small_sd3()))
    assert pipeline.text_encoder_3 is None and pipeline.default_sample_size == 8


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("model_index.json", {"_class_name": "StableDiffusion3InpaintPipeline"}, "is a StableDiffusion3Inpaint"),
        ("model_index.json", {"transformer": ["diffusers", "HunyuanDiT2DModel"]}, "with a HunyuanDiT2DModel, of which"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, None),
    ],
)
def test_what_is_of_no_family_is_refused_with_a_list_of_those_known(tmp_path, part, changes, reason):
    small_sd3_pipeline().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / part).read_text())
    (tmp_path / part).write_text(json.dumps(fields | changes))
    if reason:
        with pytest.raises(ValueError, match=f"{reason}.*these are: .*SD3Transformer2DModel"):
            check_pipeline(tmp_path)
    else:
        with pytest.raises(ValueError, match="has invert_sigmas=True, which is not supported"):
            Sampler(load_pipeline(tmp_path), steps=2, guidance_scale=1.0)


BY_RESOLUTION = {"use_dynamic_shifting": True}


@pytest.mark.parametrize("scheduler", [{}, BY_RESOLUTION], ids=["static shift", "shift by resolution"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_sampling_is_the_stock_pipelines(scheduler, guidance_scale):
    stock, prompts = small_sd3_pipeline(**scheduler), ["a b", "c", "d e f"]
    sampler = Sampler(stock, steps=4, guidance_scale=guidance_scale, seed=5)
    noise = torch.stack([sampler.noise(i) for i in range(3)])
    shape = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "height": 16, "width": 16}
    theirs = stock(prompts, latents=noise, output_type="latent", **shape).images
    cond = sampler.encode(prompts)
    assert {name: tensor.shape[1:] for name, tensor in cond.tensors.items()} == {
        "text": (FAMILY.tokens(stock), TEXT_WIDTH), "pooled": (POOLED,)}  # fmt: skip
    ours = sampler.latents(stock.transformer, cond, noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    pixels = torch.from_numpy(stock(prompts, latents=noise, output_type="np", **shape).images).permute(0, 3, 1, 2)
    drawn = sampler.images(stock.transformer, prompts, [0, 1, 2])
    assert (drawn.float() - pixels * 255).abs().max() <= 0.51  # the VAE's shift and scale
    assert sampler.evaluations(stock.transformer) == (8 if guidance_scale > 1 else 4)
    assert sampler.protocol["prediction_type"] == "flow"


def test_a_masked_image_is_the_pruned_networks(pipeline):
    sampler, network = Sampler(pipeline, steps=2, guidance_scale=3.0), pipeline.transformer
    mask_BN = torch.ones(2, 5, dtype=torch.bool)
    mask_BN[1, 2] = False
    whole, masked = sampler.images(network, ["x"], [0, 0], mask_BN)
    pruned = network.with_architecture({BLOCKS[2]: 0})
    assert torch.equal(masked, sampler.images(pruned, ["x"], [0, 0])[0]) and not torch.equal(whole, masked)


@pytest.mark.parametrize("architecture", [{BLOCKS[1]: 0}, {LAST: 0, BLOCKS[1]: 2}], ids=["middle", "last and a copy"])
def test_an_export_draws_the_same_image_in_plain_diffusers(pipeline, tmp_path, architecture):
    student = with_unet(pipeline, pipeline.transformer.with_architecture(architecture, copy_init="same"))
    export = export_pipeline(student, tmp_path / "export")
    absent = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers wants both, whatever the folder says
    place = f'"{tmp_path / "export"}", text_encoder_3=None, tokenizer_3=None'
    assert export.is_stock and export.load == f"DiffusionPipeline.from_pretrained({place})"
    stock = DiffusionPipeline.from_pretrained(tmp_path / "export", **absent)
    stock.set_progress_bar_config(disable=True)
    assert type(stock.transformer) is SD3Transformer2DModel
    assert not [*(tmp_path / "export").rglob("*.py")]
    assert "depths" not in json.loads((tmp_path / "export/transformer/config.json").read_text())
    torch.testing.assert_close(run(stock.transformer), run(student.transformer), rtol=0, atol=1e-5)
    shape = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "pt"}
    ours, theirs = (p("a b", generator=torch.Generator().manual_seed(0), **shape).images for p in (student, stock))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    again = load_pipeline(tmp_path / "export")
    assert torch.equal(run(again.transformer), run(stock.transformer))


class Pictures:
    """Four pairs of noise."""

    fingerprint, captions = "four", tuple("abcd")

    def __len__(self):
        return 4

    def check_broken(self, broken, of):
        pass

    def __getitem__(self, i):
        draw = torch.Generator().manual_seed(i)
        return {"image": torch.randint(256, (3, 16, 16), generator=draw, dtype=torch.uint8), "caption": "abcd"[i]}


def test_a_cache_holds_latents_as_the_stock_pipeline_scales_them(pipeline, tmp_path):
    cached = cache_pairs(Pictures(), pipeline, tmp_path)
    assert cached[2].keys() == {"latents", "text", "pooled", "index"} and {*cached.unconditional.tensors} == {
        "text", "pooled"}  # fmt: skip
    vae, image = pipeline.vae, Pictures()[2]["image"][None] / 127.5 - 1
    with torch.no_grad():
        own = (vae.encode(image).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(cached[2]["latents"], own[0], rtol=1e-4, atol=1e-5)


def test_it_is_counted():
    network = PrunableSD3Transformer2DModel.from_unet(small_sd3())
    assert count_gflops(network) > count_gflops(network.with_architecture({FIRST: 0})) > 0
    assert training_need(network).step > 0


def test_a_scheduler_that_is_neither_flow_matchings_nor_of_betas_is_refused(pipeline):
    with pytest.raises(ValueError, match="the model's IPNDMScheduler has no noise schedule of betas"):
        schedule_for(pipeline, IPNDMScheduler())


# ---- training


def batch() -> dict:
    draw = torch.Generator().manual_seed(3)
    text, pooled = torch.randn(4, 7, TEXT_WIDTH, generator=draw), torch.randn(4, POOLED, generator=draw)
    return {"latents": torch.randn(4, 4, 8, 8, generator=draw), "text": text, "pooled": pooled, "progress": 0.5}


def given(network) -> dict:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = schedule_for(small_sd3_pipeline(), scheduler)
    uncond = Conditioning({"text": torch.zeros(1, 7, TEXT_WIDTH), "pooled": torch.zeros(1, POOLED)})
    teacher = PrunableSD3Transformer2DModel.from_unet(small_sd3())
    return {"denoiser": denoiser_of(network, "flow"), "schedule": schedule, "uncond": uncond, "teacher": teacher}


def step_schedule(teacher_steps: int, steps: int) -> StepSchedule:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StepSchedule(scheduler, teacher_steps, scheduler, steps)


OBJECTIVES = {
    "stochastic depth": lambda **own: StochasticDepth(**own, skip_prob={"transformer": 0.2}, teacher_weight=0.5),
    "denoising": lambda **own: Denoising(**own),
    "recovery": lambda **own: Recovery(**own),
    "steps": lambda **own: StepDistillation(**own, step_schedule=step_schedule(8, 4), guided_share=0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_training_step_moves_every_block(name):
    network = PrunableSD3Transformer2DModel.from_unet(small_sd3()).with_architecture({BLOCKS[2]: 0}).train()
    loss, metrics = OBJECTIVES[name](**given(network))(network, batch(), torch.Generator().manual_seed(0))
    assert loss.isfinite() and loss > 0 and all(value.isfinite() for value in metrics.values())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_features_are_what_every_block_gives_of_the_image(network):
    pruned = network.with_architecture({FIRST: 0})
    with features_of(pruned) as features:
        run(pruned)
    assert features.keys() == {*BLOCKS[1:]} and all(f.shape == (3, 16, 16) for f in features.values())


def test_one_student_step_lands_where_the_teachers_two_land(network):
    own = given(network)
    schedule, denoiser, bounds_NK = own["schedule"], own["denoiser"], step_schedule(8, 4).bounds(own["schedule"])
    cond = Conditioning({name: batch()[name][: len(bounds_NK)] for name in ("text", "pooled")})
    x0, noise = (torch.randn(len(bounds_NK), 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    start = Draw(x0, noise, add_noise(x0, noise, schedule.alpha_sigma(bounds_NK[:, 0])), bounds_NK, cond)
    target = teacher_target(denoiser, network, schedule, start, own["uncond"], torch.zeros(0))
    z, levels = start.z_BCHW, [schedule.alpha_sigma(t_B) for t_B in bounds_NK.T]
    with torch.no_grad():
        for t_B, here, there in zip(bounds_NK.T, levels[:-1], levels[1:], strict=False):
            z = ddim_step(denoiser(network, z, t_B, cond), z, here, there, "flow")
    pred = pred_of(target.x0_BCHW, start.z_BCHW, levels[0], "flow")
    torch.testing.assert_close(ddim_step(pred, start.z_BCHW, levels[0], levels[-1], "flow"), z, rtol=1e-4, atol=1e-4)


def test_a_narrow_decoder_travels_with_its_class(tmp_path):
    pipeline = small_sd3_pipeline()
    vae = pruned_vae(pipeline.vae, choose_channels(pipeline.vae, (4, 4), "first"), (4, 4))
    report = export_pipeline(with_unet(pipeline, pipeline.transformer, vae=vae), tmp_path / "export")
    assert not report.is_stock and report.load.endswith("trust_remote_code=True)")
    options = {"text_encoder_3": None, "tokenizer_3": None, "trust_remote_code": True}
    stock = DiffusionPipeline.from_pretrained(tmp_path / "export", **options)
    assert type(stock.transformer) is SD3Transformer2DModel and type(stock.vae).__name__ == "NarrowAutoencoderKL"
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(stock.vae.decode(latents).sample, vae.decode(latents).sample)
    again = export_pipeline(load_pipeline(tmp_path / "export"), tmp_path / "again")
    assert not again.is_stock


def test_an_export_of_an_export_says_where_the_full_models_blocks_are(network, tmp_path):
    def exported(pipeline, architecture: dict[str, int], name: str) -> dict:
        pruned = pipeline.transformer.with_architecture(architecture, copy_init="same")
        return export_pipeline(with_unet(pipeline, pruned), tmp_path / name, origin=Origin("teacher", 2, 1.0)).blocks

    pipeline = with_unet(small_sd3_pipeline(), network)
    first = exported(pipeline, {BLOCKS[1]: 0, BLOCKS[2]: 2}, "first")
    assert first[BLOCKS[2]] == [BLOCKS[1], BLOCKS[2]] and first[BLOCKS[3]] == [BLOCKS[3]]
    second = exported(load_pipeline(tmp_path / "first"), {BLOCKS[0]: 0, BLOCKS[2]: 0}, "second")
    assert second == {BLOCKS[0]: [], BLOCKS[1]: [], BLOCKS[2]: [BLOCKS[0]], BLOCKS[3]: [BLOCKS[1]], LAST: [BLOCKS[2]]}
    card = (tmp_path / "second/README.md").read_text()
    assert f"of diffusers' own class, without `{BLOCKS[0]}`, `{BLOCKS[1]}` of the full model." in card
