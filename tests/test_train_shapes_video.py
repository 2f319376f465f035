"""The recipe of the bundled model of videos: stock diffusers draws what it trains."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.nn import functional as F

from scripts.shapes_video_evaluation import draw, save_strips
from scripts.shapes_video_model import (
    TextToVideoFlow,
    VideoVAEWithPosterior,
    begin_with_still_pictures,
    build_video_vae,
)
from scripts.shapes_video_recipe import ATTRIBUTES, MovingFrames, MovingScenes, VideoRecipe, motion_attributes
from slimstep.data.shapes_video import ShapesVideoPairs
from slimstep.engine.files import write_tensors
from slimstep.engine.seeding import generator

REPOSITORY = Path(__file__).parents[1]
CAPTIONS = ["a red ring moves up", "a small blue cross moves left after a large cyan circle moves down"]
SMALL = (
    "video_vae.model={base_dim:8,z_dim:4,dim_mult:[1,1],num_res_blocks:1}",
    "video.model={num_layers:2,num_attention_heads:2,attention_head_dim:12,ffn_dim:48,freq_dim:16}",
    "video.text={d_model:16,d_kv:8,d_ff:16,num_layers:1,num_heads:2}",
    *(f"{stage}.{key}"
      for stage in ("video.train", "video.decay", "video_text.train",
                    *(f"video_vae.{part}" for part in ("frames", "train", "decay")))
      for key in ("steps=2", "batch_size=2", "warmup_steps=0", "ema_decay=0.5")),
    "video_latents.scenes=4", "video_latents.batch_size=2",
)  # fmt: skip


def recipe(root: Path, overrides: Sequence[str] = SMALL) -> VideoRecipe:
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base=None):
        return VideoRecipe(compose("train_shapes", [f"root={root}", f"assets={root / 'assets'}", *overrides]))


def test_what_moves_first_is_named_first_whatever_the_caption_begins_with():
    pairs = ShapesVideoPairs("heldout", 64, seed=3)
    scene = next(scene for scene, _ in map(pairs.scene, range(64)) if len(scene.moves) == 2)
    seen = dict(zip(ATTRIBUTES, motion_attributes(scene), strict=True))
    assert ATTRIBUTES["first colour"][seen["first colour"]] == scene.moves[0].thing.colour
    assert ATTRIBUTES["second direction"][seen["second direction"]] == scene.moves[1].direction


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[VideoRecipe, TextToVideoFlow, WanPipeline]:
    """The recipe after all of its stages, its model with the weights that were packed, and the stock pipeline."""
    made = recipe(tmp_path_factory.mktemp("packed"))
    for stage in (made.video_vae, made.video_text, made.video_latents, made.video):
        stage()
    model = made.video_model()
    draw_from = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as after a long training: no gate is zero
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw_from)
    write_tensors(made.root / "video" / "decay" / "weights.safetensors", model.state_dict())
    made.export_video()
    pipeline = DiffusionPipeline.from_pretrained(made.shipped.with_name("shapes-video"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return made, model.half().float().eval(), pipeline


@pytest.mark.parametrize("padding", [493, 1])
def test_stock_diffusers_draws_from_the_packed_folder_what_was_trained(packed, padding):
    made, model, pipeline = packed
    assert type(pipeline) is WanPipeline
    x_BCFHW = torch.stack([torch.randn(4, 5, 4, 4, generator=generator("sample", 0, n)) for n in range(2)])
    size = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 19 + padding}
    options = {"num_inference_steps": 2, "guidance_scale": 2.5, "output_type": "latent", **size}
    theirs = pipeline(CAPTIONS, latents=x_BCFHW, **options).frames
    ids_BL, empty_ids_BL, padding_B = (
        made.video_ids(CAPTIONS),
        made.video_ids(["", ""]),
        torch.full((2,), float(padding)),
    )
    for t, end in ((1.0, 0.001), (0.001, 0.0)):  # the scheduler's grid
        with torch.no_grad():
            away, toward = (
                model(x_BCFHW, torch.full((2,), 1000 * t), ids, padding_B) for ids in (empty_ids_BL, ids_BL)
            )
        x_BCFHW = x_BCFHW + (end - t) * (away + 2.5 * (toward - away))
    torch.testing.assert_close(theirs, x_BCFHW, atol=2e-3, rtol=2e-3)


def test_cached_latents_have_unit_variance_in_every_channel(packed):
    made, _, pipeline = packed
    measured = json.loads((made.root / "video_vae" / "vae.json").read_text())
    assert pipeline.vae.config.latents_std == measured["latents_std"]
    latents = load_file(made.root / "video_latents" / "latents.safetensors")["latents"]
    std_C = latents.float().std((0, 2, 3, 4))
    assert (std_C > 0.5).all() and (std_C < 2).all()


def test_videos_are_drawn_and_shown_by_the_stock_pipeline(packed, tmp_path):
    _, _, pipeline = packed
    videos = draw(pipeline, CAPTIONS, 1, 2.0, 0, 20)
    assert videos.shape == (2, 9, 32, 32, 3) and videos.dtype == torch.uint8
    save_strips(videos, tmp_path / "strips.png")
    assert (tmp_path / "strips.png").stat().st_size > 0


def test_every_stage_continues_where_it_was(packed):
    made, _, _ = packed
    before = {path: path.stat().st_mtime_ns for path in made.root.rglob("weights.safetensors")}
    for stage in (made.video_vae, made.video_text, made.video_latents):
        stage()
    assert before == {path: path.stat().st_mtime_ns for path in made.root.rglob("weights.safetensors")}


def test_after_single_frames_still_videos_are_coded_as_frames():
    config = OmegaConf.create({"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1})
    model = VideoVAEWithPosterior(build_video_vae(config))
    begin_with_still_pictures(model.vae)
    videos = torch.rand(2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    videos[:, :, 1::2] = videos[:, :, 2::2]  # what two frames share is one latent's
    with torch.no_grad():
        frames = [model.painted(model.vae.encode(frame).latent_dist.mode()) for frame in videos.split(1, dim=2)]
        painted = model.painted(model.vae.encode(videos).latent_dist.mode())
    torch.testing.assert_close(painted, torch.cat(frames, dim=2), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_single_frames_teach_the_autoencoder_more_than_the_background(tmp_path):
    """Of videos that it has never seen."""
    settle = "steps=2 learning_rate=1e-5"
    rates = {"frames": "steps=200 learning_rate=3e-3", "train": settle, "decay": settle}
    own = [f"video_vae.{stage}.{key}" for stage, keys in rates.items() for key in keys.split()]
    model = "video_vae.model={base_dim:16,z_dim:8,dim_mult:[1,2],num_res_blocks:1}"
    made = recipe(tmp_path, [*SMALL, "video_vae.frames.batch_size=16", "video_vae.frames.ema_decay=0.9", *own, model])
    made.video_vae()
    videos = MovingScenes(made.video_pairs("heldout", 8, 1), 3.0).collate(list(range(8)))["image"].float() / 127.5 - 1
    vae = made.trained_video_vae()
    with torch.no_grad():
        painted = vae.decode(vae.encode(videos).latent_dist.mode()).sample
    flat = videos.mean((2, 3, 4), keepdim=True).expand_as(videos)
    assert F.mse_loss(painted, videos) < 0.9 * F.mse_loss(flat, videos)


def test_a_single_frame_is_one_of_its_video(packed):
    made, _, _ = packed
    pairs = made.video_pairs("train", 4, 0)
    frame = MovingFrames(pairs).collate([2])["image"][0, :, 0]
    fine = MovingScenes(ShapesVideoPairs("train", 4, 0, 32, frames=129)).collate([2])["image"][0]
    others = MovingScenes(ShapesVideoPairs("train", 4, 0, 32, frames=129)).collate([3])["image"][0]
    own, other = ((video.float() - frame[:, None]).abs().mean((0, 2, 3)).min() for video in (fine, others))
    assert own < 1 < other
