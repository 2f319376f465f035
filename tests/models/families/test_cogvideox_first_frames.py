"""CogVideoX that begins with a frame, and 1.5: the stock pipeline's videos, data, sizes and exports."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline
from PIL import Image

from scripts.random_transformers import FIRST_FRAME, FIRST_FRAME_15, OF_15, small_cogvideox_pipeline
from slimstep.data.cache import cache_pairs, described_cache
from slimstep.data.encoding import encode_images
from slimstep.data.first_frames import captioned_frames_in_folder
from slimstep.data.shapes_video import ShapesVideoPairs
from slimstep.eval.memory_plan import half_as_long, running_lines
from slimstep.eval.sampling import Sampler
from slimstep.eval.timing.inference import InferenceConfig
from slimstep.eval.timing.speed import TimedPipeline
from slimstep.models.card import Origin
from slimstep.models.conditioning import conditioning_of
from slimstep.models.family import draws_from_frames, family_at, family_of
from slimstep.models.first_frames import noise_source, with_first_frames, with_video_options
from slimstep.models.pipeline import check_pipeline, export_pipeline, load_pipeline, with_unet
from slimstep.models.sizes import set_resolution

NAMES = ["a red square", "b"]
ROTARY = {"use_rotary_positional_embeddings": True}
KINDS = {"5B": FIRST_FRAME, "1.5": FIRST_FRAME_15}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: a folder with the pipeline}."""
    place = tmp_path_factory.mktemp("cogvideox")
    for kind, fields in KINDS.items():
        small_cogvideox_pipeline(**fields).save_pretrained(place / kind)
    return {kind: place / kind for kind in KINDS}


def frames_of(side: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randint(256, (side, side, 3), generator=draw, dtype=torch.uint8) for name in NAMES}


def load(folder, side: int = 16):
    pipeline = load_pipeline(folder)
    if pipeline.transformer.config.patch_size_t:  # positions of 32×32 pixels, of which these are the first
        set_resolution(pipeline, side)
    return with_first_frames(pipeline, frames_of(side))


def drawn(pipeline, sampler: Sampler, output_type: str) -> torch.Tensor:
    """What the stock pipeline draws of the first frames and captions from the sampler's noise."""
    pictures = [Image.fromarray(frame.numpy()) for frame in pipeline.__dict__["first_frames"].values()]
    noise = torch.stack([sampler.noise(i) for i in range(len(NAMES))])
    options = family_of(pipeline).call(pipeline, sampler.guidance_scale, noise)
    steps = {"num_inference_steps": sampler.steps, "output_type": output_type}
    generators = [noise_source(picture) for picture in pictures]
    return pipeline(pictures, NAMES, **steps, **options, generator=generators).frames


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_sampling_is_the_stock_pipelines(kind, guidance_scale, folders):
    """Also where a network makes tokens of two latents, so that one stands before the video."""
    pipeline = load(folders[kind])
    sampler = Sampler(pipeline, steps=3, guidance_scale=guidance_scale)
    assert sampler.latent_shape == (4, 3 if kind == "5B" else 4, 4, 4)
    noise = torch.stack([sampler.noise(i) for i in range(2)])
    ours = sampler.latents(pipeline.transformer, sampler.encode(NAMES), noise)
    torch.testing.assert_close(ours.transpose(1, 2), drawn(pipeline, sampler, "latent"), rtol=1e-3, atol=1e-4)
    videos = sampler.images(pipeline.transformer, NAMES, [0, 1])
    assert videos.shape == (2, 9, 16, 16, 3)
    assert (videos - 255 * torch.from_numpy(drawn(pipeline, sampler, "np"))).abs().max() <= 0.51
    timed = TimedPipeline(pipeline, InferenceConfig(), NAMES, 3, guidance_scale, torch.device("cpu"), batch=2)
    assert (timed.images(2).int() - videos.int()).abs().max() <= 1


def test_a_video_depends_on_its_first_frame_and_on_its_caption(folders):
    pipeline = load(folders["5B"])
    sampler = Sampler(pipeline, steps=1, guidance_scale=1.0)

    def draw(name: str, frame: torch.Tensor) -> torch.Tensor:
        with_first_frames(pipeline, {name: frame})
        return sampler.latents(pipeline.transformer, sampler.family.encode(pipeline, [name]), sampler.noise(0)[None])

    one, two = frames_of(16).values()
    first = draw(NAMES[0], one)
    assert torch.equal(first, draw(NAMES[0], one))
    assert not torch.equal(first, draw(NAMES[0], two)) and not torch.equal(first, draw(NAMES[1], one))


def test_cached_videos_have_captions_and_the_latents_of_their_first_frame(folders, tmp_path):
    """Those that sampling has; guidance leads away from the empty caption of the same frame, and so do dropped ones."""
    pipeline, pairs = load(folders["1.5"]), ShapesVideoPairs(size=3, resolution=16, frames=9)
    cached = cache_pairs(pairs, pipeline, tmp_path, batch_size=2)
    item, caption = cached[1], pairs[1]["caption"]
    assert {*item} == {"index", "latents", "text", "first_frame"}
    with_first_frames(pipeline, {caption: pairs[1]["video"][0]})
    for name, tensor in family_of(pipeline).encode(pipeline, [caption]).tensors.items():
        torch.testing.assert_close(item[name][None], tensor, rtol=0, atol=1e-5)
    assert item["latents"].shape == (4, 4, 4, 4) and torch.equal(item["latents"][:, 0], item["latents"][:, 1])
    batch = {name: torch.stack([cached[0][name], cached[1][name]]) for name in item if name != "index"}
    uncond = cached.unconditional
    cond = conditioning_of(batch, like=uncond)
    dropped = cond.where(torch.tensor([True, False]), uncond)
    assert torch.equal(dropped.tensors["first_frame"], batch["first_frame"])
    assert torch.equal(cond.emptied(uncond).tensors["first_frame"], batch["first_frame"])
    assert torch.equal(dropped.tensors["text"][1], uncond.tensors["text"][0])


def test_first_frames_of_training_may_have_noise_which_sampling_never_has(folders, tmp_path):
    pairs = ShapesVideoPairs(size=1, resolution=16, frames=9)
    plain, noisy = (with_video_options(load(folders["5B"]), options) for options in (None, {"noise_aug_strength": 0.3}))
    video = pairs[0]["video"][None]
    with torch.no_grad():
        one, other = (encode_images(pipeline, video, torch.device("cpu")) for pipeline in (plain, noisy))
    assert torch.equal(one["latents"], other["latents"]) and not torch.equal(one["first_frame"], other["first_frame"])
    own, same = (family_of(pipeline).encode(pipeline, NAMES).tensors["first_frame"] for pipeline in (plain, noisy))
    assert torch.equal(own, same)
    made = [cache_pairs(pairs, pipeline, tmp_path).folder for pipeline in (plain, noisy)]
    assert made[0] != made[1]


def test_latents_of_the_first_frame_are_scaled_as_its_configuration_says(folders):
    """Published networks of first frames divide by the factor with which all other latents are multiplied."""
    pipeline, ratios = load(folders["5B"]), []
    for inverted in (True, False):
        pipeline.vae.register_to_config(invert_scale_latents=inverted)
        ratios.append(family_of(pipeline).encode(pipeline, NAMES).tensors["first_frame"])
    torch.testing.assert_close(ratios[0], ratios[1] / 0.7**2)


def test_learnt_positions_are_of_one_size_and_length(folders):
    """diffusers gives a video of another length positions that the network never learnt."""
    pipeline = load(folders["5B"])
    for size, reason in ((("16x32",), "data.resolution=16x32: .* learnt the positions of 16 alone"),
                         ((16, 17), "data.frames=17: .* learnt the positions of 9 frames alone")):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            set_resolution(pipeline, *size)
    set_resolution(pipeline, 16, 9)
    teacher = SimpleNamespace(pipeline=pipeline, unet=pipeline.transformer, text_length=226)
    assert half_as_long(teacher) is None, "a plan advises no other length"
    assert "vae_tiling" not in "".join(running_lines(pipeline)), "nor tiles that do not fit together"
    other = load(folders["1.5"])
    assert half_as_long(SimpleNamespace(pipeline=other, unet=other.transformer, text_length=226))[0] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_one_is_exported_as_diffusers_own_and_draws_the_same_video(kind, folders, tmp_path):
    pipeline = load(folders[kind])
    pruned = pipeline.transformer.with_architecture({"transformer_blocks.1": 0})
    origin = Origin("teacher", 2, 3.0, video={})
    assert export_pipeline(with_unet(pipeline, pruned), tmp_path / "export", origin=origin).is_stock
    stock = CogVideoXImageToVideoPipeline.from_pretrained(tmp_path / "export")
    stock.set_progress_bar_config(disable=True)
    assert stock.transformer.config.num_layers == 3
    sampler, student = Sampler(with_unet(pipeline, pruned), 2, 3.0), with_unet(pipeline, pruned)
    ours, name = sampler.images(pruned, NAMES, [0, 1])[:1], NAMES[0]
    picture = Image.fromarray(student.__dict__["first_frames"][name].numpy())
    noise = sampler.noise(0)[None].transpose(1, 2)
    size = {"height": 16, "width": 16, "num_frames": 9}
    theirs = stock(picture, name, num_inference_steps=2, guidance_scale=3.0, latents=noise, output_type="np",
                   generator=noise_source(picture), **size).frames  # fmt: skip
    assert (ours - 255 * torch.from_numpy(theirs)).abs().max() <= 0.51
    card = (tmp_path / "export/README.md").read_text()
    assert "pipeline_tag: image-to-video" in card and 'pipeline(image, "…", num_inference_steps=2' in card
    assert "guidance_scale=3, height=16, width=16)" in card


def test_networks_of_channels_that_do_not_fit_and_options_of_others_are_refused_by_name(folders, tmp_path):
    assert draws_from_frames(family_at(folders["5B"])) and draws_from_frames(family_at(folders["1.5"]))
    small_cogvideox_pipeline(**FIRST_FRAME).save_pretrained(tmp_path)
    config = tmp_path / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 4}))
    with pytest.raises(ValueError, match="in_channels=4 and out_channels=4; it must take twice as many as it gives"):
        check_pipeline(tmp_path)
    with pytest.raises(ValueError, match=r"has \['fps'\]; it may have noise_aug_strength$"):
        load_pipeline(folders["5B"], video={"fps": 7})


def test_prompts_have_the_one_length_that_positions_are_added_to(folders, tmp_path):
    """CogVideoX-2B's too; rotary positions are of the video alone."""
    for kind, fields in {"2B": {}, "text 5B": ROTARY}.items():
        small_cogvideox_pipeline(**fields).save_pretrained(tmp_path / kind)
    for folder in (tmp_path / "2B", folders["5B"]):
        with pytest.raises(ValueError, match="max_sequence_length=20: this .* of 226 tokens alone: set that, or null"):
            load_pipeline(folder, max_sequence_length=20)
        assert load_pipeline(folder, max_sequence_length=226)
    for folder in (tmp_path / "text 5B", folders["1.5"]):
        assert load_pipeline(folder, max_sequence_length=20)


def test_images_to_begin_with_have_captions(tmp_path):
    for k, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (20, 16), colour).save(tmp_path / f"{k}.png")
    with pytest.raises(ValueError, match="this model reads captions, and 0.png has no caption"):
        captioned_frames_in_folder(tmp_path, 16, 3)
    for k, caption in enumerate(("a red wall", "a meadow")):
        (tmp_path / f"{k}.txt").write_text(caption)
    frames = captioned_frames_in_folder(tmp_path, 16, 3)
    assert {*frames} == {"a red wall", "a meadow"}
    assert frames["a red wall"].shape == (16, 16, 3) and frames["a red wall"][0, 0].tolist() == [255, 0, 0]


def test_a_text_pipeline_of_15_has_a_latent_before_its_video(tmp_path):
    """Which training videos have, too, and which is not decoded."""
    small_cogvideox_pipeline(**OF_15).save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path)
    video = ShapesVideoPairs(size=1, resolution=32, frames=9)[0]["video"][None]
    with torch.no_grad():
        latents = encode_images(pipeline, video, torch.device("cpu"))["latents"]
        own = pipeline.vae(video.permute(0, 4, 1, 2, 3) / 127.5 - 1).sample
    pairs, other = ShapesVideoPairs(size=1, resolution=32, frames=9), small_cogvideox_pipeline(**ROTARY)
    made_from = [described_cache(pairs, one, "float32", 2) for one in (pipeline, other)]
    assert made_from[0] == {**made_from[1], "patch_size_t": 2}
    sampler = Sampler(pipeline, 1, 1.0)
    assert sampler.latent_shape == latents.shape[1:] == (4, 4, 8, 8)
    torch.testing.assert_close(sampler.pixels(latents), own, rtol=1e-4, atol=1e-5)
    sampler = Sampler(pipeline, 2, 4.0)
    options = family_of(pipeline).call(pipeline, 4.0, sampler.noise(0)[None])
    (theirs,) = pipeline(["a b"], num_inference_steps=2, output_type="np", **options).frames
    (ours,) = sampler.images(pipeline.transformer, ["a b"], [0])
    assert (ours - 255 * torch.from_numpy(theirs)).abs().max() <= 0.51
