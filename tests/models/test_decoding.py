"""Latents mean to this project what they mean to the stock pipeline: scaling, and the statistics of SDXL's VAEs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from safetensors.torch import save_file

from scripts.random_transformers import small_cogvideox_pipeline, small_wan_pipeline
from slimstep.data.cache import described_cache
from slimstep.data.encoding import encode_images
from slimstep.eval.export_job import joined
from slimstep.eval.sampling import Sampler
from slimstep.models.autoencoder import load_vae
from slimstep.models.decoding import ImageDecoder, has_statistics, scaled, statistics, unscaled
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from slimstep.prune.decoder import choose_channels, pruned_vae
from tests.tiny import tiny_pipeline, tiny_sdxl_pipeline

MEAN, STD = [-1.6, 1.1, 0.3, -0.5], [8.4, 5.8, 1.5, 3.0]
FIELDS = [
    {"latents_mean": MEAN, "latents_std": STD},
    {"latents_mean": tuple(MEAN)},  # alone it is not read
    {"latents_std": STD},
    {"shift_factor": 0.3},
]
MAKERS = {"sd": tiny_pipeline, "sdxl": tiny_sdxl_pipeline}


@pytest.fixture(scope="module")
def pipelines():
    made = {name: make() for name, make in MAKERS.items()}
    return {name: with_unet(p, PrunableUNet2DConditionModel.from_unet(p.unet).eval()) for name, p in made.items()}


@pytest.fixture
def pipeline_with(pipelines):
    """A pipeline of a kind around a VAE that has these fields."""

    def make(kind, fields):
        own = pipelines[kind].vae
        stated = {name: value for name, value in own.config.items() if name != "_use_default_values"}
        vae = AutoencoderKL.from_config({**stated, **fields}).eval()
        vae.load_state_dict(own.state_dict())
        pipeline = with_unet(pipelines[kind], pipelines[kind].unet, vae=vae)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("kind", MAKERS)
def test_images_are_those_of_the_stock_pipeline_whatever_its_vae_says_of_latents(pipeline_with, kind, fields):
    pipeline = pipeline_with(kind, fields)
    sampler = Sampler(pipeline, steps=2, guidance_scale=2.0)
    stock = pipeline("a cat", latents=sampler.noise(0)[None], num_inference_steps=2, guidance_scale=2.0).images[0]
    ours = sampler.images(pipeline.unet, ["a cat"], [0])
    assert torch.equal(ours[0].permute(1, 2, 0), torch.from_numpy(np.array(stock)))


def test_the_statistics_change_the_images_of_sdxl(pipeline_with):
    images = [
        Sampler(pipeline, 1, 1.0).images(pipeline.unet, ["a cat"], [0]).float()
        for pipeline in (pipeline_with("sdxl", {}), pipeline_with("sdxl", FIELDS[0]))
    ]
    assert (images[0] - images[1]).abs().mean() > 1


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("kind", MAKERS)
def test_images_are_encoded_as_the_stock_pipeline_of_that_class_encodes_them(pipeline_with, kind, fields):
    pipeline = pipeline_with(kind, fields)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    ours = encode_images(pipeline, images, torch.device("cpu"))["latents"]
    stock = {"sd": StableDiffusionImg2ImgPipeline, "sdxl": StableDiffusionXLImg2ImgPipeline}[kind]
    with torch.no_grad():
        mean = pipeline.vae.encode(images / 127.5 - 1).latent_dist.mode()
    pipeline.vae.encode = lambda _: SimpleNamespace(latents=mean)  # img2img draws from the posterior; its mean is kept
    scheduler = SimpleNamespace(add_noise=lambda latents, noise, timestep: latents)
    parts = SimpleNamespace(vae=pipeline.vae, scheduler=scheduler)
    theirs = stock.prepare_latents(parts, images / 127.5 - 1, None, 2, 1, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("normalised", [False, True])
def test_scaling_is_the_inverse_of_unscaling(normalised):
    latents = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    mean_std = statistics({**FIELDS[0], "latent_channels": 4}) if normalised else None
    torch.testing.assert_close(scaled(unscaled(latents, 0.5, mean_std), 0.5, mean_std), latents)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_decoder_is_trained_and_chosen_on_what_the_pipeline_decodes(pipeline_with, kind):
    pipeline = pipeline_with(kind, FIELDS[0])
    latents = torch.randn(2, 4, 8, 8)
    decoder = ImageDecoder(pipeline.vae, has_statistics(pipeline))
    torch.testing.assert_close(decoder(latents), Sampler(pipeline, 1, 1.0).pixels(latents))
    seen = []
    handle = pipeline.vae.decoder.conv_in.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0]))
    Sampler(pipeline, 1, 1.0).pixels(latents[:1])
    handle.remove()
    torch.testing.assert_close(decoder.inputs(latents[:1]), seen[0])


def test_channels_are_chosen_by_what_the_pipeline_decodes(pipeline_with):
    pipeline, latents = pipeline_with("sdxl", FIELDS[0]), torch.randn(2, 4, 8, 8)
    mean, std = statistics(pipeline.vae.config)
    raw = latents * std + mean * pipeline.vae.config.scaling_factor
    chosen = choose_channels(pipeline.vae, (4, 4), "activation_energy", latents, normalised=True)
    assert chosen == choose_channels(pipeline.vae, (4, 4), "activation_energy", raw)


def test_a_pruned_decoder_keeps_its_statistics_through_an_export(pipeline_with, tmp_path):
    pipeline = pipeline_with("sdxl", FIELDS[0])
    vae = pruned_vae(pipeline.vae, choose_channels(pipeline.vae, (4, 4), "first"), (4, 4))
    export_pipeline(with_unet(pipeline, pipeline.unet, vae=vae), tmp_path / "export")
    loaded = load_pipeline(tmp_path / "export")
    assert has_statistics(loaded)
    latents = torch.randn(1, 4, 8, 8)
    expected = vae.decode(unscaled(latents, vae.config.scaling_factor, statistics(vae.config)))[0]
    torch.testing.assert_close(Sampler(loaded, 1, 1.0).pixels(latents), expected)


class OnePair:
    fingerprint = "one"

    def __len__(self):
        return 1


@pytest.mark.parametrize("kind", MAKERS)
def test_a_cache_is_another_where_the_statistics_count(pipeline_with, kind):
    plain, normalised = (pipeline_with(kind, fields) for fields in ({}, FIELDS[0]))
    keys = [described_cache(OnePair(), pipeline, "float32", 8) for pipeline in (plain, normalised)]
    assert ("statistics" in keys[1]) == (kind == "sdxl") and "statistics" not in keys[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latents_mean": MEAN[:3], "latents_std": STD}, r"latents_mean=.* must be 4 numbers"),
        ({"latents_mean": MEAN, "latents_std": 1.0}, r"latents_std=1.0 must be 4 numbers"),
        ({"latents_mean": MEAN, "latents_std": [1.0, 0.0, 1.0, 1.0]}, r"latents_std=.* must be above 0"),
        ({"latents_mean": ["a"] * 4, "latents_std": STD}, r"latents_mean=.* must be 4 numbers"),
        ({"latents_mean": MEAN, "latents_std": [float("nan")] * 4}, r"latents_std=.* must be 4 numbers"),
    ],
)
def test_statistics_that_are_none_are_refused_when_the_pipeline_is_read(pipelines, tmp_path, fields, message):
    pipelines["sdxl"].save_pretrained(tmp_path)
    file = tmp_path / "vae/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path)


OTHER = [
    {"latents_mean": MEAN}, {"latents_std": STD}, FIELDS[0], {"shift_factor": 0.1}, {"scaling_factor": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("fields", OTHER)
def test_another_vae_whose_latents_mean_something_else_is_refused(pipeline_with, tmp_path, fields):
    pipeline = pipeline_with("sdxl", {})
    other = pipeline_with("sdxl", fields)
    other.vae.save_pretrained(tmp_path)
    own = dict(pipeline.vae.config)
    with pytest.raises(ValueError, match=f"belongs to another kind of model: its {next(iter(fields))} is"):
        load_vae(str(tmp_path), own, torch.float32, False)
    load_vae(str(tmp_path), dict(other.vae.config), torch.float32, False)
    with pytest.raises(ValueError, match=f"reads other latents than the model's: .*{next(iter(fields))}"):
        joined(pipeline, other, "export.vae=x")


@pytest.mark.parametrize("make", [small_wan_pipeline, small_cogvideox_pipeline])
def test_autoencoders_of_videos_are_exchanged_where_their_latents_are_the_same(make):
    pipeline, other = make(), make()
    assert joined(pipeline, other, "export.vae=x").vae is other.vae
    named = "latents_mean" if "latents_mean" in other.vae.config else "scaling_factor"
    other.vae.register_to_config(**{named: [0.0] * 4 if named == "latents_mean" else 0.1})
    with pytest.raises(ValueError, match=f"reads other latents than the model's: .*{named}"):
        joined(pipeline, other, "export.vae=x")


def test_another_vae_that_shrinks_otherwise_is_refused(pipelines, tmp_path):
    AutoencoderKL.from_config({**pipelines["sdxl"].vae.config, "block_out_channels": (8,),
                               "down_block_types": ("DownEncoderBlock2D",),
                               "up_block_types": ("UpDecoderBlock2D",)}).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match="its shrinking factor is 1, the model's 2"):
        load_vae(str(tmp_path), dict(pipelines["sdxl"].vae.config), torch.float32, False)


def test_a_vae_in_one_file_has_the_statistics_of_the_models_own(pipeline_with, tmp_path):
    pipeline = pipeline_with("sdxl", FIELDS[0])
    save_file(pipeline.vae.state_dict(), tmp_path / "vae.safetensors")
    loaded = load_vae(str(tmp_path / "vae.safetensors"), dict(pipeline.vae.config), torch.float32, False)
    assert list(loaded.config.latents_std) == STD
