"""Stable Video Diffusion in its pipeline: first frames as prompts, the stock pipeline's videos, data and options."""

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image

from scripts.random_svd import FRAMES, small_svd_pipeline
from slimstep.data.cache import cache_pairs
from slimstep.data.encoding import encode_images
from slimstep.data.first_frames import frames_in_folder, frames_of_videos
from slimstep.data.shapes_video import ShapesVideoPairs
from slimstep.eval.inputs import check_first_frames, load_metrics, of_what_is_drawn
from slimstep.eval.sampling import Sampler
from slimstep.eval.timing.inference import InferenceConfig
from slimstep.eval.timing.speed import TimedPipeline
from slimstep.eval.timing.stage_timer import timed_components
from slimstep.models.card import Origin
from slimstep.models.conditioning import conditioning_of
from slimstep.models.decoding import decoded_images, encoded_images
from slimstep.models.described import described_pipeline
from slimstep.models.families.svd.conditions import conditions_of
from slimstep.models.family import family_at, family_of
from slimstep.models.first_frames import VideoOptions, noise_source, with_first_frames, with_video_options
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from slimstep.models.sizes import check_frames, native_frames, native_pixels, set_frames, set_resolution
from tests.tiny import small_pipeline

NAMES = ["one", "two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("svd") / "model"
    small_svd_pipeline().save_pretrained(folder)
    return folder


def first_frames() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randint(256, (16, 16, 3), generator=draw, dtype=torch.uint8) for name in NAMES}


def load(folder, **options):
    return with_first_frames(load_pipeline(folder, **options), first_frames())


def drawn(pipeline, sampler: Sampler, k: int, output_type: str) -> torch.Tensor:
    """What the stock pipeline draws of a first frame from the sampler's noise, with the frame's own noise."""
    picture = Image.fromarray(first_frames()[NAMES[k]].numpy())
    options = family_of(pipeline).call(pipeline, sampler.guidance_scale, sampler.noise(k)[None])
    steps = {"num_inference_steps": sampler.steps, "output_type": output_type, "generator": noise_source(picture)}
    return pipeline(picture, **steps, **options).frames[0]


@pytest.mark.parametrize(("guidance_scale", "video"), [
    (1.0, None), (3.0, {"fps": 12, "noise_aug_strength": 0.5, "decode_chunk_size": 2}),
])  # fmt: skip
def test_sampling_is_the_stock_pipelines(folder, guidance_scale, video):
    """Latents and frames: the image's embedding and noisy latents, what it is told beside, the scale of each frame, and
    the decoder's frames at once."""
    pipeline = load(folder, video=video)
    sampler = Sampler(pipeline, steps=3, guidance_scale=guidance_scale)
    assert sampler.latent_shape == (4, FRAMES, 8, 8) and sampler.protocol["prediction_type"] == "edm"
    assert sampler.protocol["video"]["fps"] == (12 if video else 7)
    latents = sampler.latents_at(pipeline.unet, sampler.encode(NAMES), [0, 1])
    videos = sampler.images(pipeline.unet, NAMES, [0, 1])
    assert videos.dtype == torch.uint8 and videos.shape == (2, FRAMES, 16, 16, 3)
    for k in range(len(NAMES)):
        stock = drawn(pipeline, sampler, k, "latent").transpose(0, 1)
        torch.testing.assert_close(latents[k], stock, rtol=1e-3, atol=1e-4)
        pixels = 255 * torch.from_numpy(drawn(pipeline, sampler, k, "np"))
        assert (videos[k] - pixels).abs().max() <= 0.51


def test_what_is_timed_is_the_stock_pipeline_from_first_frames(folder):
    pipeline = load(folder)
    timed = TimedPipeline(pipeline, InferenceConfig(), NAMES, 2, 3.0, torch.device("cpu"), batch=2)
    drawn = timed.sampler.images(pipeline.unet, NAMES, [0, 1])
    assert (timed.images(2).int() - drawn.int()).abs().max() <= 1
    with timed_components(pipeline, torch.device("cpu")) as timer:
        spent = timer.time(timed.call)
    assert all(spent[part] > 0 for part in ("image encoder", "UNet", "VAE")) and timer.rows == 2 * 2 * len(NAMES)


def test_a_video_depends_on_its_first_frame_and_on_how_much_noise_that_has(folder):
    def draw(options: dict, names: list[str]) -> torch.Tensor:
        pipeline = load(folder, video=options)
        sampler = Sampler(pipeline, steps=2, guidance_scale=1.0)
        noise = torch.stack([sampler.noise(0)])
        return sampler.latents(pipeline.unet, sampler.encode(names), noise)

    one = draw({}, ["one"])
    assert not torch.equal(one, draw({}, ["two"])) and not torch.equal(one, draw({"noise_aug_strength": 0.3}, ["one"]))
    assert not torch.equal(one, draw({"motion_bucket_id": 20}, ["one"])) and torch.equal(one, draw({"fps": 7}, ["one"]))


def test_a_first_frame_without_that_name_is_an_error_that_says_how_to_name_one(folder):
    with pytest.raises(ValueError, match=r"none is called 'three': data.first_frames=FOLDER"):
        Sampler(load(folder), 1, 1.0).encode(["three"])


def test_frames_are_encoded_one_by_one_and_decoded_together(folder):
    """In chunks as the stock pipeline has them; neighbours in a chunk see each other, others do not."""
    vae, draw = load(folder).vae, torch.Generator().manual_seed(1)
    videos = torch.rand(2, 3, FRAMES, 16, 16, generator=draw)
    latents = encoded_images(vae, videos)
    for f in range(FRAMES):
        assert torch.equal(latents[:, :, f], encoded_images(vae, videos[:, :, f]))
    whole, cut = decoded_images(vae, latents), decoded_images(vae, latents, 2)
    assert whole.shape == videos.shape
    torch.testing.assert_close(cut[:, :, :2], decoded_images(vae, latents[:, :, :2]))
    assert not torch.allclose(cut[:, :, 2], whole[:, :, 2])


def test_cached_videos_have_what_their_first_frame_says_and_nothing_of_captions(folder, tmp_path):
    """The same as prompts have, so that training and sampling know one condition; the empty one has zeros."""
    pipeline, pairs = load(folder), ShapesVideoPairs(size=3, resolution=16, frames=FRAMES)
    cached = cache_pairs(pairs, pipeline, tmp_path, batch_size=2)
    item, first = cached[1], conditions_of(pipeline, [pairs[1]["video"][0]])
    assert {*item} == {"index", "latents", "image", "image_latents", "time_ids"}
    assert item["latents"].shape == (4, FRAMES, 8, 8)
    for name, tensor in first.tensors.items():
        assert torch.equal(item[name][None], tensor), name
    batch = {name: torch.stack([cached[0][name], cached[1][name]]) for name in item if name != "index"}
    uncond = cached.unconditional
    dropped = conditioning_of(batch, like=uncond).where(torch.tensor([True, False]), uncond)
    assert dropped.tensors["image"][0].any() and not dropped.tensors["image"][1].any()
    assert not dropped.tensors["image_latents"][1].any()
    assert torch.equal(dropped.tensors["time_ids"], batch["time_ids"])
    other = with_video_options(load(folder), {"motion_bucket_id": 40})
    assert cache_pairs(pairs, other, tmp_path, batch_size=2).folder != cached.folder


def test_latents_are_scaled_and_those_of_the_first_frame_are_not(folder):
    pipeline = load(folder, video={"noise_aug_strength": 0.0})
    videos = ShapesVideoPairs(size=1, resolution=16, frames=FRAMES)[0]["video"][None]
    with torch.no_grad():
        encoded = encode_images(pipeline, videos, torch.device("cpu"))
    scaled = encoded["image_latents"] * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(encoded["latents"][:, :, 0], scaled, rtol=1e-4, atol=1e-5)


def test_a_rectangle_of_another_length_is_the_stock_pipelines_and_its_card_says_how_to_draw_it(folder, tmp_path):
    pipeline = load(folder)
    set_resolution(pipeline, "16x32", frames=4)
    frame = torch.randint(256, (16, 32, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    with_first_frames(pipeline, {"wide": frame})
    sampler, picture = Sampler(pipeline, 2, 3.0), Image.fromarray(frame.numpy())
    (video,) = sampler.images(pipeline.unet, ["wide"], [0])
    options = family_of(pipeline).call(pipeline, 3.0, sampler.noise(0)[None])
    steps = {"num_inference_steps": 2, "output_type": "np", "generator": noise_source(picture)}
    stock = pipeline(picture, **steps, **options).frames[0]
    assert video.shape == (4, 16, 32, 3) and (video - 255 * torch.from_numpy(stock)).abs().max() <= 0.51
    options = {"fps": 7, "motion_bucket_id": 127, "noise_aug_strength": 0.02, "decode_chunk_size": None}
    export_pipeline(pipeline, tmp_path / "wide", origin=Origin("teacher", 2, 3.0, video=options))
    card = (tmp_path / "wide/README.md").read_text()
    assert "num_frames=4, max_guidance_scale=3, height=16, width=32, fps=7, motion_bucket_id=127" in card
    assert 'image = load_image("FIRST_FRAME.png")' in card and "decode_chunk_size" not in card


def test_any_number_of_frames_will_do(folder):
    pipeline = load(folder)
    check_frames(pipeline, 4)
    set_frames(pipeline, 5)
    assert native_frames(pipeline) == 5 and Sampler(pipeline, 1, 1.0).latent_shape == (4, 5, 8, 8)


def test_a_whole_network_is_exported_as_diffusers_own_and_a_pruned_one_with_its_class(folder, tmp_path):
    pipeline = load(folder, video={"motion_bucket_id": 30})
    assert export_pipeline(pipeline, tmp_path / "whole").is_stock
    stock = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert type(stock.unet) is type(pipeline.unet).STOCK
    slim = pipeline.unet.with_architecture({"mid_block.resnets.0.temporal_res_block": 0})
    report = export_pipeline(with_unet(pipeline, slim), tmp_path / "slim")
    assert not report.is_stock and "mid_block.resnets.0.temporal_res_block (is changed" in report.obstacles[0]
    assert report.blocks["mid_block.resnets.0.temporal_res_block"] == []
    again, here = load(tmp_path / "slim"), Sampler(with_unet(pipeline, slim), 2, 2.0)
    with_video_options(again, {"motion_bucket_id": 30})
    assert torch.equal(Sampler(again, 2, 2.0).images(again.unet, NAMES, [0, 1]), here.images(slim, NAMES, [0, 1]))


def test_first_frames_are_of_held_out_videos_or_of_a_folder(tmp_path):
    pairs = ShapesVideoPairs(split="heldout", size=6, resolution=16, frames=2)
    frames = frames_of_videos(pairs, 4)
    assert len(frames) == 4
    firsts = {pair["caption"]: pair["video"][0] for pair in (pairs[i] for i in range(6))}
    assert all(torch.equal(firsts[name], frame) for name, frame in frames.items())
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "deep/a.png")
    Image.new("RGB", (20, 30), "blue").save(tmp_path / "b.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    found = frames_in_folder(tmp_path, 16, 9)
    assert {*found} == {"deep/a.png", "b.jpg"} and found["deep/a.png"].shape == (16, 16, 3)
    assert len(frames_in_folder(tmp_path, 16, 1)) == 1
    with pytest.raises(ValueError, match="holds no images"):
        frames_in_folder(tmp_path / "none", 16, 1)


def test_without_captions_no_clip_score_is_asked_for_and_motion_always_is():
    config, scorer = OmegaConf.create({"metrics": None, "evaluation": {"preferences": None}}), None
    without = of_what_is_drawn(load_metrics(config, scorer, torch.device("cpu"), False), True, scorer)
    assert [*without] == ["image_error", "fd", "motion"]


@pytest.mark.parametrize(("options", "reason"), [
    ({"frames": 3}, r"has \['frames'\]; it may have fps"), ({"fps": 0}, "fps=0 must be at least 1"),
    ({"decode_chunk_size": -1}, "decode_chunk_size=-1 must be"), ({"noise_aug_strength": -0.1}, "at least 0"),
    ({"decode_chunk_size": 0}, "decode_chunk_size=0 must be"),
])  # fmt: skip
def test_what_a_video_cannot_be_made_with_is_said_in_one_line(options, reason):
    with pytest.raises(ValueError, match=reason):
        VideoOptions.of(options)


def test_what_is_not_said_of_a_first_frame_is_its_pipelines_own():
    assert VideoOptions.of({}) == VideoOptions()
    assert VideoOptions.of({}, "CogVideoXImageToVideoPipeline").noise_aug_strength == 0


def test_models_of_images_have_no_video_options_and_data_of_images_make_no_videos(folder):
    with pytest.raises(ValueError, match="model.video=.* is for a StableVideoDiffusionPipeline"):
        with_video_options(small_pipeline(), {"fps": 7})
    with pytest.raises(ValueError, match="needs data of videos"):
        check_first_frames(OmegaConf.create({"resolution": 16}))
    with pytest.raises(ValueError, match="data.first_frames=FOLDER"):
        check_first_frames(OmegaConf.create({"frames": 3, "prompt_file": "prompts.txt"}))
    with pytest.raises(ValueError, match="model.vae=other takes the place of an AutoencoderKL alone"):
        load_pipeline(folder, vae="other")


def test_the_published_one_is_described_without_weights():
    pipeline = described_pipeline("svd_xt")
    assert family_of(pipeline).NAME.startswith("Stable Video Diffusion") and native_frames(pipeline) == 25
    assert all(p.device.type == "meta" for part in (pipeline.unet, pipeline.vae) for p in part.parameters())
    parameters = sum(p.numel() for p in pipeline.unet.parameters())
    assert round(parameters / 1e9, 2) == 1.52 and native_pixels(pipeline) == "576x1024"


def test_the_size_of_the_pipelines_call_is_the_default_and_a_students_own_is_kept(folder, tmp_path):
    """The published configurations state 768×768, which nobody draws."""
    pipeline = small_svd_pipeline()
    pipeline.unet.register_to_config(sample_size=384)  # its autoencoder shrinks by two
    pipeline.save_pretrained(tmp_path / "published")
    assert native_pixels(load_pipeline(tmp_path / "published")) == "576x1024"
    assert native_pixels(load_pipeline(folder)) == 16
    export_pipeline(pipeline, tmp_path / "student", origin=Origin("teacher", 2, 3.0, video={}))
    assert native_pixels(load_pipeline(tmp_path / "student")) == 768


def test_a_folder_is_of_the_family(folder):
    assert family_at(folder).NETWORK.__name__ == "PrunableUNetSpatioTemporalConditionModel"
