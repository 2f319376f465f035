"""PixArt, FLUX, Sana, Qwen-Image, CogVideoX, Wan: their blocks, their exports as stock, their sampling (test_sd3.py has
all laws)."""

import json

import pytest
import torch
from diffusers import (
    CogVideoXPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    WanPipeline,
)
from torch import nn

from scripts.random_transformers import (
    small_flux_pipeline,
    small_pixart_pipeline,
    small_qwen_image_pipeline,
    small_sana_pipeline,
    small_sd3_pipeline,
)
from slimstep.data.encoding import encode_images
from slimstep.engine.low_rank import add_low_rank, merge_low_rank
from slimstep.eval.sampling import Sampler
from slimstep.models.card import Origin
from slimstep.models.families.transformer.flux import packed, unpacked
from slimstep.models.families.transformer.stock import to_stock
from slimstep.models.family import denoiser_of, family_of
from slimstep.models.networks import sequence_length
from slimstep.models.pipeline import check_pipeline, export_pipeline, load_pipeline, with_unet
from slimstep.models.sizes import scale_factor, settle_sizes
from tests.models.families.small import PIPELINES, PRUNABLE, STOCK, run
from tests.tiny import small_pipeline

FOUR = [f"transformer_blocks.{i}" for i in range(4)]
BLOCKS = {
    "PixArt": FOUR,
    "FLUX": FOUR[:3] + [f"single_transformer_blocks.{i}" for i in range(2)],
    "Sana": FOUR,
    "Qwen-Image": FOUR,
    "CogVideoX": FOUR,
    "CogVideoX 5B": FOUR,
    "Wan": [f"blocks.{i}" for i in range(4)],
}


@pytest.fixture(scope="module", params=BLOCKS)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def network(family):
    network = PRUNABLE[family].from_unet(STOCK[family]())
    network.register_to_config(sample_size=network.config.get("sample_size") or 8)  # which pipelines of some do not say
    return network


def test_open_masks_are_the_stock_transformer(network, family):
    stock = STOCK[family]()
    stock.register_to_config(sample_size=network.config.sample_size)
    assert [*network.all_blocks] == BLOCKS[family] == [*network.copyable_blocks]
    mask_BN = torch.ones(3, len(network.all_blocks), dtype=torch.bool)
    assert torch.equal(run(network, block_mask_BN=mask_BN), run(stock)) and torch.equal(run(network), run(stock))


def test_a_closed_mask_is_the_pruned_transformer_for_each_sample_alone(network):
    mask_BN = torch.rand(3, len(network.all_blocks), generator=torch.Generator().manual_seed(2)) < 0.6
    masked = run(network, block_mask_BN=mask_BN)
    for row, open_N in enumerate(mask_BN.tolist()):
        closed = [block for block, is_open in zip(network.all_blocks, open_N, strict=True) if not is_open]
        assert torch.equal(run(network.with_architecture(dict.fromkeys(closed, 0)))[row], masked[row])


def test_a_fresh_copy_changes_nothing(network):
    torch.testing.assert_close(run(network.with_architecture(dict.fromkeys(network.all_blocks, 2))), run(network))


def test_the_stock_transformer_has_the_pruned_ones_output(network):
    for block in network.all_blocks:
        other = next(b for b in network.all_blocks if b != block)
        pruned = network.with_architecture({block: 0, other: 2}, copy_init="same")
        made = to_stock(pruned)
        assert type(made) is type(network).STOCK and torch.equal(run(made), run(pruned))
        assert (run(pruned) - run(network)).abs().max() > 1e-3, "a block that does nothing says nothing"


def test_a_mask_survives_gradient_checkpointing(network):
    own = network.with_architecture({}).train()
    denoiser = denoiser_of(own)
    inputs = denoiser.example(own, 3, tokens=7, generator=torch.Generator().manual_seed(0))
    mask_BN = torch.rand(3, len(own.all_blocks), generator=torch.Generator().manual_seed(0)) < 0.5
    grads = []
    for _ in range(2):
        own.zero_grad()
        denoiser(own, *inputs, block_mask_BN=mask_BN).square().mean().backward()
        grads.append([p.grad.clone() for p in own.parameters() if p.grad is not None])
        own.enable_gradient_checkpointing()
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_a_low_rank_update_is_merged_into_the_same_network(network):
    own = network.with_architecture({network.all_blocks[0]: 0})
    names, before = [*own.state_dict()], run(own)
    add_low_rank(own, 2, seed=0)
    assert torch.equal(run(own), before), "it is zero at first"
    trained = {name: parameter for name, parameter in own.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    torch.manual_seed(1)
    for name, parameter in trained.items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    updated = run(own)
    merge_low_rank(own)
    assert [*own.state_dict()] == names and (updated - before).abs().max() > 1e-3
    torch.testing.assert_close(run(own), updated, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(to_stock(own)), run(own))


def test_packing_is_undone():
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert packed(x).shape == (2, 6, 12) and torch.equal(unpacked(packed(x), 4, 6), x)


def sides(pipeline) -> dict[str, int]:
    """The size of 8×8 latents, of videos 4×4."""
    latents = 4 if isinstance(pipeline, (CogVideoXPipeline, WanPipeline)) else 8
    return dict.fromkeys(("height", "width"), latents * scale_factor(pipeline))


def drawn(stock, sampler: Sampler, noise: torch.Tensor, latents: torch.Tensor, **options):
    """The latents of a stock pipeline and ours, for prompts of different lengths."""
    prompts = ["a b", "c", "d e f"]
    theirs = stock(prompts, latents=latents, output_type="latent", **sides(stock), **options).images
    return theirs, sampler.latents(stock.transformer, sampler.encode(prompts), noise)


@pytest.mark.parametrize("kind", [PixArtAlphaPipeline, PixArtSigmaPipeline])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_sampling_is_pixarts(kind, guidance_scale):
    stock = small_pixart_pipeline(kind, use_additional_conditions=False)
    sampler = Sampler(stock, steps=3, guidance_scale=guidance_scale)
    noise = torch.stack([sampler.noise(i) for i in range(3)])
    options = {"num_inference_steps": 3, "guidance_scale": guidance_scale, "use_resolution_binning": False}
    theirs, ours = drawn(stock, sampler, noise, noise, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance_embeds", [False, True], ids=["schnell", "dev"])
def test_sampling_is_flux(guidance_embeds):
    by_resolution = {"use_dynamic_shifting": True} if guidance_embeds else {}
    stock, scale = small_flux_pipeline(guidance_embeds, **by_resolution), 3.5 if guidance_embeds else 1.0
    settle_sizes(stock)  # as load_pipeline does
    sampler = Sampler(stock, steps=3, guidance_scale=scale)
    noise = torch.stack([sampler.noise(i) for i in range(3)])
    theirs, ours = drawn(stock, sampler, noise, packed(noise), num_inference_steps=3, guidance_scale=scale)
    torch.testing.assert_close(packed(ours), theirs, rtol=1e-4, atol=1e-5)
    assert sampler.evaluations(stock.transformer) == 3
    if not guidance_embeds:
        with pytest.raises(ValueError, match="FluxPipeline has no guidance; set 1 in .* eval.guidance_scale"):
            Sampler(stock, steps=3, guidance_scale=2.0)


def pixels(stock, prompts: list[str], noise: torch.Tensor, **options) -> torch.Tensor:
    """The images of a stock pipeline, of 255."""
    images = stock(prompts, latents=noise, output_type="np", **sides(stock), **options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 255


EULER = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.mark.parametrize(("scheduler", "guidance_scale"), [(None, 1.0), (None, 4.5), (EULER, 4.5)])
def test_sampling_is_sanas(scheduler, guidance_scale):
    stock = small_sana_pipeline(scheduler)
    sampler = Sampler(stock, steps=3, guidance_scale=guidance_scale)
    noise = torch.stack([sampler.noise(i) for i in range(3)])
    options = {"num_inference_steps": 3, "guidance_scale": guidance_scale, "use_resolution_binning": False}
    theirs, ours = drawn(stock, sampler, noise, noise, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert sampler.protocol["prediction_type"] == "flow"
    prompts = ["a b", "c", "d e f"]
    images = sampler.images(stock.transformer, prompts, [0, 1, 2]).float()
    assert (images - pixels(stock, prompts, noise, **options)).abs().max() <= 0.51  # the scale of its autoencoder


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_sampling_is_qwen_images(guidance_scale):
    """The length of what is guided, too, and the mean and deviation of its VAE."""
    stock = small_qwen_image_pipeline(use_dynamic_shifting=True, shift_terminal=0.02)
    stock.transformer.register_to_config(sample_size=8)
    sampler = Sampler(stock, steps=3, guidance_scale=guidance_scale)
    noise, prompts = torch.stack([sampler.noise(i) for i in range(3)]), ["a b", "c", "d e f"]
    options = {"num_inference_steps": 3, "true_cfg_scale": guidance_scale, "negative_prompt": [" "] * 3}
    theirs, ours = drawn(stock, sampler, noise, packed(noise), **options)
    torch.testing.assert_close(packed(ours), theirs, rtol=1e-4, atol=1e-5)
    images = sampler.images(stock.transformer, prompts, [0, 1, 2]).float()
    assert (images - pixels(stock, prompts, packed(noise), **options)).abs().max() <= 0.51


@pytest.mark.parametrize("make", [small_sana_pipeline, small_qwen_image_pipeline])
def test_latents_of_images_are_as_the_pipeline_decodes_them(make):
    """What it decodes from the latents that are kept of images is what its autoencoder makes of these images."""
    pipeline = make()
    pipeline.transformer.register_to_config(sample_size=8)
    side = sides(pipeline)["width"]
    images = torch.randint(256, (2, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        latents = encode_images(pipeline, images, torch.device("cpu"))["latents"]
        frames = images / 127.5 - 1 if make is small_sana_pipeline else (images / 127.5 - 1)[:, :, None]
        own = pipeline.vae(frames).sample
    assert latents.shape == (2, 4, 8, 8)
    torch.testing.assert_close(Sampler(pipeline, 1, 1.0).pixels(latents), own.view(images.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "field"),
    [(small_sana_pipeline, "guidance_embeds"), (small_qwen_image_pipeline, "zero_cond_t")],
)
def test_networks_of_other_pipelines_are_refused_by_name(make, field, tmp_path):
    make().save_pretrained(tmp_path)
    config = tmp_path / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: True}))
    with pytest.raises(ValueError, match=f"transformer/config.json has {field}=true, a network of another"):
        check_pipeline(tmp_path)


def test_another_autoencoder_takes_the_place_of_an_autoencoderkl_alone(tmp_path):
    small_sana_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model.vae={tmp_path} takes the place of an AutoencoderKL alone.*DC"):
        load_pipeline(tmp_path, vae=str(tmp_path))


def test_an_export_draws_the_same_image_in_plain_diffusers(family, tmp_path):
    made = PIPELINES[family]()
    made.save_pretrained(tmp_path / "model")
    pipeline = load_pipeline(tmp_path / "model")
    first, *_, last = pipeline.transformer.all_blocks
    student = with_unet(pipeline, pipeline.transformer.with_architecture({last: 0, first: 2}))
    export = export_pipeline(student, tmp_path / "export")
    assert export.load == f'DiffusionPipeline.from_pretrained("{tmp_path / "export"}")'
    stock = DiffusionPipeline.from_pretrained(tmp_path / "export")
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "pt", **sides(stock)}
    options |= {"use_resolution_binning": False} if family in ("PixArt", "Sana") else {}
    options |= {"negative_prompt": " "} if family == "Qwen-Image" else {}
    drawn = (p("a b", generator=torch.Generator().manual_seed(0), **options) for p in (student, stock))
    ours, theirs = (made.frames if hasattr(made, "frames") else made.images for made in drawn)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [small_sd3_pipeline, small_pixart_pipeline, small_flux_pipeline])
def test_prompts_are_cut_to_what_the_pipeline_is_called_with(make, tmp_path):
    make().save_pretrained(tmp_path / "model")
    whole, cut = load_pipeline(tmp_path / "model"), load_pipeline(tmp_path / "model", max_sequence_length=3)
    family = family_of(cut)
    assert family.tokens(whole) - family.tokens(cut) == family.sequence_length(whole) - 3
    sampler = Sampler(cut, steps=3, guidance_scale=1.0)
    assert sampler.encode(["a b c d"]).tensors["text"].shape[1] == family.tokens(cut)
    assert sampler.protocol["max_sequence_length"] == 3 and "max_sequence_length" not in Sampler(whole, 3, 1.0).protocol
    noise = torch.stack([sampler.noise(i) for i in range(3)])
    options = {"use_resolution_binning": False} if make is small_pixart_pipeline else {}
    options |= {"num_inference_steps": 3, "guidance_scale": 1.0, "max_sequence_length": 3}
    latents = packed(noise) if make is small_flux_pipeline else noise
    theirs, ours = drawn(cut, sampler, noise, latents, **options)
    torch.testing.assert_close(packed(ours) if make is small_flux_pipeline else ours, theirs, rtol=1e-4, atol=1e-5)

    export_pipeline(cut, tmp_path / "export", origin=Origin("teacher", 3, 1.0, 3))
    assert "max_sequence_length=3).images" in (tmp_path / "export/README.md").read_text()
    assert sequence_length(load_pipeline(tmp_path / "export")) == 3, "what it was made with"


def test_a_unet_has_no_max_sequence_length(tmp_path):
    small_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="max_sequence_length=3: a StableDiffusionPipeline has no such argument"):
        load_pipeline(tmp_path, max_sequence_length=3)
