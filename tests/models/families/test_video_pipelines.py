"""CogVideoX and Wan: sampling and coding of videos are their pipelines' (test_transformers.py has the laws of their
blocks)."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, DiffusionPipeline
from diffusers.schedulers import scheduling_dpm_cogvideox
from omegaconf import OmegaConf

from scripts.random_transformers import small_cogvideox_pipeline, small_wan_pipeline
from slimstep.data.cache import described_cache
from slimstep.data.encoding import encode_images
from slimstep.data.shapes_video import ShapesVideoPairs
from slimstep.eval.inputs import settle_frames
from slimstep.eval.sampling import Sampler
from slimstep.models.decoding import code_in_tiles, decoded_images, encoded_images
from slimstep.models.family import denoiser_of, family_of, schedule_for
from slimstep.models.noise_schedule import ddim_step
from slimstep.models.pipeline import check_pipeline, export_pipeline, load_pipeline, with_unet
from slimstep.models.sizes import check_frames, native_frames, set_frames
from tests.models.families.small import PIPELINES
from tests.tiny import small_pipeline

PROMPTS = ["a b", "c"]
KINDS = ("CogVideoX", "CogVideoX 5B", "Wan")


def load(tmp_path, kind: str = "CogVideoX", **options) -> DiffusionPipeline:
    PIPELINES[kind](**options).save_pretrained(tmp_path / "model")
    return load_pipeline(tmp_path / "model")


def drawn(pipeline: DiffusionPipeline, sampler: Sampler, output_type: str) -> torch.Tensor:
    """What the stock pipeline draws from the sampler's noise."""
    noise = torch.stack([sampler.noise(i) for i in range(len(PROMPTS))])
    options = family_of(pipeline).call(pipeline, sampler.guidance_scale, noise)
    generators = sampler.generators(range(len(PROMPTS)))
    steps = {"num_inference_steps": sampler.steps, "output_type": output_type, "generator": generators}
    return pipeline(PROMPTS, **steps, **options).frames


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_sampling_is_the_stock_pipelines(kind, guidance_scale, tmp_path):
    pipeline = load(tmp_path, kind)
    sampler = Sampler(pipeline, steps=3, guidance_scale=guidance_scale)
    predicts = "flow" if kind == "Wan" else "v_prediction"
    assert sampler.latent_shape == (4, 3, 4, 4) and sampler.protocol["prediction_type"] == predicts
    cond, noise = sampler.encode(PROMPTS), torch.stack([sampler.noise(i) for i in range(2)])
    ours = sampler.latents(pipeline.transformer, cond, noise)
    as_theirs = family_of(pipeline).as_tokens(ours)
    torch.testing.assert_close(as_theirs, drawn(pipeline, sampler, "latent"), rtol=1e-4, atol=1e-5)
    videos = sampler.images(pipeline.transformer, PROMPTS, [0, 1])
    assert videos.dtype == torch.uint8 and videos.shape == (2, 9, 16, 16, 3)
    assert (videos - 255 * torch.from_numpy(drawn(pipeline, sampler, "np"))).abs().max() <= 0.51


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_of_another_length_and_size_is_the_stock_pipelines(kind, tmp_path):
    """Positions of CogVideoX 5B are those of the size that it was made for, stretched."""
    pipeline = load(tmp_path, kind)
    set_frames(pipeline, 17)
    pipeline.transformer.register_to_config(sample_size=[4, 8])
    sampler = Sampler(pipeline, steps=2, guidance_scale=4.0)
    videos = sampler.images(pipeline.transformer, PROMPTS, [0, 1])
    assert videos.shape == (2, 17, 16, 32, 3)
    assert (videos - 255 * torch.from_numpy(drawn(pipeline, sampler, "np"))).abs().max() <= 0.51


def test_sampling_is_its_dpm_solvers(monkeypatch, tmp_path):
    """The solver adds noise, which each has along axes in its own order: the stock pipeline is given ours."""
    fields = small_cogvideox_pipeline().scheduler.config
    scheduler = CogVideoXDPMScheduler.from_config(fields, timestep_spacing="trailing")
    pipeline = load(tmp_path, scheduler=scheduler)
    sampler = Sampler(pipeline, steps=4, guidance_scale=4.0)
    videos = sampler.images(pipeline.transformer, PROMPTS, [0, 1])
    draw = scheduling_dpm_cogvideox.randn_tensor
    turned = lambda shape, **options: draw(tuple(shape[k] for k in (0, 2, 1, 3, 4)), **options).transpose(1, 2)  # noqa: E731
    monkeypatch.setattr(scheduling_dpm_cogvideox, "randn_tensor", turned)
    assert (videos - 255 * torch.from_numpy(drawn(pipeline, sampler, "np"))).abs().max() <= 0.51
    assert not torch.equal(videos, sampler.reseeded(1).images(pipeline.transformer, PROMPTS, [0, 1]))


def test_its_noise_schedule_is_the_one_that_its_scheduler_steps_on(tmp_path):
    """Shifted, and with zero terminal SNR."""
    pipeline = load(tmp_path)
    schedule, scheduler = schedule_for(pipeline), pipeline.scheduler
    assert schedule.alpha_T[-1] == 0 and schedule.prediction_type == "v_prediction"
    scheduler.set_timesteps(4)
    draw = torch.Generator().manual_seed(0)
    z, pred = (torch.randn(1, 4, 3, 4, 4, generator=draw) for _ in range(2))
    for (start, end), t in zip(schedule.grid(scheduler, 4), scheduler.timesteps, strict=True):
        levels = [schedule.alpha_sigma(time[None]) for time in (start, end)]
        ours, theirs = ddim_step(pred, z, *levels, "v_prediction"), scheduler.step(pred, t, z, return_dict=False)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["CogVideoX", "Wan"])
def test_latents_of_videos_are_as_the_pipeline_decodes_them(kind, tmp_path):
    pipeline = load(tmp_path, kind)
    videos = torch.randint(256, (2, 9, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        latents = encode_images(pipeline, videos, torch.device("cpu"))["latents"]
        own = pipeline.vae(videos.permute(0, 4, 1, 2, 3) / 127.5 - 1).sample
    assert latents.shape == (2, 4, 3, 4, 4)
    torch.testing.assert_close(Sampler(pipeline, 1, 1.0).pixels(latents), own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "tiles"), [("CogVideoX", (24, 20)), ("Wan", (24, 20, 20, 16))])
def test_videos_apart_are_the_same_and_tiles_are_where_a_video_is_no_larger(kind, tiles, tmp_path):
    pairs = ShapesVideoPairs(size=2, resolution=48, frames=9)
    x_BCFHW = torch.stack([pairs[i]["video"] for i in range(2)]).movedim(-1, 1)[..., :40].float() / 127.5 - 1
    vae = load(tmp_path, kind).vae
    with torch.no_grad():
        whole = encoded_images(vae, x_BCFHW)
        for code, given in ((encoded_images, x_BCFHW), (decoded_images, whole)):
            together, small = code(vae, given), given[..., : given.shape[-2] // 4, : given.shape[-1] // 5]
            apart = torch.cat([code(vae, one) for one in given.split(1)])
            torch.testing.assert_close(apart, together, rtol=0, atol=1e-3)
            in_a_tile = code(vae, small)
            vae.enable_tiling(*tiles)
            assert torch.equal(code(vae, small), in_a_tile)
            in_tiles = code(vae, given)
            assert in_tiles.shape == together.shape and not torch.equal(in_tiles, together)
            vae.disable_tiling()


def test_tiling_is_an_option_of_a_model_that_caches_and_protocols_know(tmp_path):
    small_wan_pipeline().save_pretrained(tmp_path / "model")
    whole, tiled = load_pipeline(tmp_path / "model"), load_pipeline(tmp_path / "model", vae_tiling=True)
    pairs = ShapesVideoPairs(size=2, resolution=16, frames=9)
    made_from = [described_cache(pairs, pipeline, "float32", 2) for pipeline in (whole, tiled)]
    assert made_from[1] == {**made_from[0], "vae_tiling": True}
    protocols = [Sampler(pipeline, 2, 1.0).protocol for pipeline in (whole, tiled)]
    assert protocols[1] == {**protocols[0], "vae_tiling": True}


def test_tiles_that_do_not_fit_together_are_an_error(tmp_path):
    """diffusers would give a video of another size back."""
    small_cogvideox_pipeline().save_pretrained(tmp_path / "model")
    vae = load_pipeline(tmp_path / "model", vae_tiling=True).vae
    for code, shape in ((encoded_images, (1, 3, 1, 16, 16)), (decoded_images, (1, 4, 1, 4, 4))):
        with torch.no_grad(), pytest.raises(ValueError, match="model.vae_tiling=true: tiles of this .* do not fit"):
            code(vae, torch.zeros(shape))


def test_what_has_no_autoencoder_has_no_tiles():
    with pytest.raises(ValueError, match="model.vae_tiling=true: a SimpleNamespace .* it has no autoencoder"):
        code_in_tiles(SimpleNamespace())


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_a_video_of_one_frame(kind, tmp_path):
    pipeline = load(tmp_path, kind)
    image = torch.randint(256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        latents = encode_images(pipeline, image, torch.device("cpu"))["latents"]
    assert latents.shape == (1, 4, 1, 4, 4)
    denoiser = denoiser_of(pipeline.transformer)
    _, t_B, cond = denoiser.example(pipeline.transformer, 1)
    with torch.no_grad():
        assert denoiser(pipeline.transformer, latents, t_B, cond).shape == latents.shape


def test_data_of_videos_have_as_many_frames_as_the_pipeline_draws_unless_they_say_others():
    for stated, frames in {None: 9, 17: 17}.items():
        data = OmegaConf.create({"frames": stated})
        settle_frames(small_wan_pipeline(), data)
        assert data.frames == frames
    with pytest.raises(ValueError, match="the data are videos, and a StableDiffusionPipeline draws images"):
        settle_frames(small_pipeline(), OmegaConf.create({"frames": None}))


@pytest.mark.parametrize("kind", ["CogVideoX", "Wan"])
def test_frames_are_refused_that_the_vae_does_not_give_back(kind):
    pipeline = PIPELINES[kind]()
    for frames in range(1, 19):
        with torch.no_grad():
            latents = pipeline.vae.encode(torch.zeros(1, 3, frames, 16, 16)).latent_dist.mode()
            is_whole = pipeline.vae.decode(latents).sample.shape[2] == frames
        # CogVideoX's gives back also 8 and 16, as the frames of an even number of latents that those of others are.
        if is_whole and frames % 4 == 1:
            check_frames(pipeline, frames)
            continue
        with pytest.raises(ValueError, match=f"videos of {frames} frames do not fit.* nearest: "):
            check_frames(pipeline, frames)


@pytest.mark.parametrize("kind", ["CogVideoX", "Wan"])
def test_an_export_of_other_frames_draws_them(kind, tmp_path):
    pipeline = load(tmp_path, kind)
    set_frames(pipeline, 17)
    pruned = pipeline.transformer.with_architecture({pipeline.transformer.all_blocks[1]: 0})
    assert export_pipeline(with_unet(pipeline, pruned), tmp_path / "export").is_stock
    stock = DiffusionPipeline.from_pretrained(tmp_path / "export")
    stock.set_progress_bar_config(disable=True)
    assert native_frames(load_pipeline(tmp_path / "export")) == 17
    sampler = Sampler(with_unet(pipeline, pruned), steps=2, guidance_scale=3.0)
    ours = sampler.images(pruned, PROMPTS, [0, 1])
    noise = family_of(pipeline).as_tokens(torch.stack([sampler.noise(i) for i in range(2)]))
    size = {"height": 16, "width": 16, "num_frames": 17} if kind == "Wan" else {}  # whose pipeline has its own
    theirs = stock(PROMPTS, num_inference_steps=2, guidance_scale=3.0, latents=noise, output_type="np", **size).frames
    assert (ours - 255 * torch.from_numpy(theirs)).abs().max() <= 0.51


@pytest.mark.parametrize(("field", "value"), [("ofs_embed_dim", 2), ("use_learned_positional_embeddings", True)])
def test_networks_of_other_versions_are_refused_by_name(field, value, tmp_path):
    small_cogvideox_pipeline().save_pretrained(tmp_path)
    config = tmp_path / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=f"config.json has {field}={json.dumps(value)}, a network of another kind"):
        check_pipeline(tmp_path)


def test_two_transformers_one_after_the_other_are_refused_by_name(tmp_path):
    small_wan_pipeline().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"boundary_ratio": 0.9}))
    with pytest.raises(ValueError, match="model_index.json has boundary_ratio=0.9, a network of another kind"):
        check_pipeline(tmp_path)
