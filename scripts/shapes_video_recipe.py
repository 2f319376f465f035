"""The recipe of the bundled model of videos, beside those of the images: its stages, each of which leaves files.

Axes: B batch, C channels, F frames, H and W pixels or latents, L text tokens, N scenes.
"""

import functools
import json
from dataclasses import replace

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import CLIPTokenizer

from scripts.shapes_models import plain, save_pipeline
from scripts.shapes_objectives import (
    UNLABELLED,
    AutoencoderObjective,
    Batch,
    FlowObjective,
    ReadingObjective,
    to_unit_range,
)
from scripts.shapes_recipe import CachedScenes, Recipe, load_newest
from scripts.shapes_transformer import build_flow_scheduler
from scripts.shapes_video_evaluation import evaluate_video
from scripts.shapes_video_model import (
    CaptionReader,
    TextToVideoFlow,
    VideoVAEWithPosterior,
    begin_with_still_pictures,
    build_video_pipeline,
    build_video_tokenizer,
    build_video_vae,
)
from slimstep.data.render import render_scenes
from slimstep.data.shapes import COLOURS, SHAPES, SIZES
from slimstep.data.shapes_video import (
    DIRECTIONS,
    MotionWording,
    MovingScene,
    ShapesVideoPairs,
    caption,
    video_of,
)
from slimstep.engine.config import TrainConfig
from slimstep.engine.files import write_json, write_tensors
from slimstep.engine.loop import train
from slimstep.engine.parallel import map_batches
from slimstep.engine.seeding import generator
from slimstep.models.decoding import encoded_images
from slimstep.models.noise_schedule import schedule_of

ATTRIBUTES = {
    "shapes": (1, 2), "background": COLOURS,
    "first shape": SHAPES, "first colour": COLOURS, "first size": SIZES, "first direction": tuple(DIRECTIONS),
    "second shape": SHAPES, "second colour": COLOURS, "second size": SIZES, "second direction": tuple(DIRECTIONS),
}  # fmt: skip
NUM_CLASSES = [len(classes) for classes in ATTRIBUTES.values()]


def motion_attributes(scene: MovingScene) -> list[int]:
    """The class of every attribute of `ATTRIBUTES`; what moves first comes first."""
    seen = {"shapes": len(scene.moves), "background": scene.background}
    for place, move in zip(("first", "second"), scene.moves, strict=False):
        seen |= {f"{place} shape": move.thing.shape, f"{place} colour": move.thing.colour}
        seen |= {f"{place} size": move.thing.size, f"{place} direction": move.direction}
    return [classes.index(seen[name]) if name in seen else UNLABELLED for name, classes in ATTRIBUTES.items()]


class MovingScenes(torch.utils.data.Dataset):
    """Videos drawn as they are needed, uint8 [B, C, F, H, W]; their shapes up to `enlarged` times as large."""

    def __init__(self, pairs: ShapesVideoPairs, enlarged: float = 1.0) -> None:
        self.pairs, self.enlarged = pairs, enlarged

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: list[int]) -> Batch:
        return {"image": torch.stack([self.video(index) for index in indices]).permute(0, 4, 1, 2, 3)}

    def video(self, index: int) -> Tensor:
        return video_of(self.scene(index), self.pairs.frames, self.pairs.resolution)

    def scene(self, index: int) -> MovingScene:
        scene, _ = self.pairs.scene(index)
        times = 1 + (self.enlarged - 1) * torch.rand((), generator=generator("enlarged", index)).item()
        return replace(scene, moves=tuple(replace(move, radius=times * move.radius) for move in scene.moves))


class MovingFrames(MovingScenes):
    """One frame of each video, from a random instant: [B, C, 1, H, W]."""

    def collate(self, indices: list[int]) -> Batch:
        times = [torch.rand((), generator=generator("instant", index)).item() for index in indices]
        scenes = [self.scene(index).at(time) for index, time in zip(indices, times, strict=True)]
        return {"image": render_scenes(scenes, self.pairs.resolution)[:, :, None]}


class MotionReading(MovingScenes):
    """Token ids of fully worded captions and their scenes' attributes, without videos."""

    def __init__(self, pairs: ShapesVideoPairs, recipe: "VideoRecipe") -> None:
        super().__init__(pairs)
        self.recipe = recipe

    def collate(self, indices: list[int]) -> Batch:
        scenes = [self.pairs.scene(index) for index in indices]
        texts = [caption(scene, replace(MotionWording(), last_first=w.last_first)) for scene, w in scenes]
        labels = torch.tensor([motion_attributes(scene) for scene, _ in scenes])
        return {"ids": self.recipe.video_ids(texts), "attributes": labels}


class VideoRecipe(Recipe):
    """The stages of the model of videos; they need nothing of the others."""

    @functools.cached_property
    def video_tokenizer(self) -> CLIPTokenizer:
        return build_video_tokenizer(self.config.video.max_tokens)

    def video_pairs(self, split: str, size: int, seed: int) -> ShapesVideoPairs:
        return ShapesVideoPairs(split, size, seed, self.config.video_vae.resolution)

    def video_ids(self, captions: list[str]) -> Tensor:
        """Token ids [B, L], as the pipeline makes them."""
        return self.video_tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def video_vae(self) -> None:
        config, run = self.config.video_vae, self.run("video_vae")
        torch.manual_seed(self.config.seed)
        model = VideoVAEWithPosterior(build_video_vae(config.model))
        objective = AutoencoderObjective(config.kl_weight, config.crop, config.crop_share, absolute_weight=0.0)
        pairs = self.video_pairs("train", config.scenes, self.config.seed)
        frames, videos = (kind(pairs, config.enlarged) for kind in (MovingFrames, MovingScenes))
        for stage, data in (("frames", frames), ("train", videos), ("decay", MovingScenes(pairs))):
            if stage == "train":
                begin_with_still_pictures(model.vae)
            train(model, objective, data, TrainConfig(**plain(config[stage])), run, stage)
        run.json("vae.json", lambda: self.measured_video_vae(model.vae))

    @torch.no_grad()
    def measured_video_vae(self, vae: AutoencoderKLWan) -> dict[str, float | list[float]]:
        """Mean and deviation of each channel of the latents, and the reconstruction's PSNR on held-out scenes."""
        scenes = MovingScenes(self.video_pairs("heldout", 128, 1))
        psnrs, latents = [], []
        for indices in torch.arange(len(scenes)).split(32):
            batch = to_unit_range(scenes.collate(indices.tolist())["image"]).to(vae.device)
            latents.append(encoded_images(vae, batch))
            error_B = ((vae.decode(latents[-1]).sample - batch) / 2).square().mean((1, 2, 3, 4))
            psnrs.append(-10 * error_B.log10())
        deviation_C, mean_C = torch.std_mean(torch.cat(latents), dim=(0, 2, 3, 4))
        rounded = {"latents_mean": mean_C, "latents_std": deviation_C}
        rounded = {name: [round(value, 4) for value in values.tolist()] for name, values in rounded.items()}
        return {**rounded, "psnr_db": float(torch.cat(psnrs).mean())}

    def trained_video_vae(self) -> AutoencoderKLWan:
        """The VAE as far as it is trained, with the statistics of its latents."""
        model = VideoVAEWithPosterior(build_video_vae(self.config.video_vae.model))
        folder = self.root / "video_vae"
        for stage in ("frames", "train", "decay"):
            load_newest(model, folder / stage)
        if (folder / "vae.json").exists():
            measured = json.loads((folder / "vae.json").read_text())
            model.vae.register_to_config(**{name: measured[name] for name in ("latents_mean", "latents_std")})
        return model.vae.eval()

    def video_text(self) -> None:
        """The text encoder before the transformer: what moves where, and in which order, from captions alone."""
        pairs = self.video_pairs("train", self.config.video_text.scenes, self.config.seed)
        reader = CaptionReader(self.video_model().text, NUM_CLASSES)
        config = TrainConfig(**plain(self.config.video_text.train))
        train(reader, ReadingObjective(None), MotionReading(pairs, self), config, self.run("video_text"), "train")

    def video_latents(self) -> None:
        """Encoded once: float16 latents [N, C, F, H, W] of unit variance and token ids [N, L]."""
        config, run, device = self.config.video_latents, self.run("video_latents"), self.accelerator.device
        if run.made("latents.safetensors"):
            return
        if not (measured := self.root / "video_vae/vae.json").exists():
            raise FileNotFoundError(f"{measured} does not exist; make it with stage=video_vae")
        vae = self.trained_video_vae().to(device)
        mean, std = (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        pairs = self.video_pairs("train", config.scenes, self.config.seed)
        scenes = MovingScenes(pairs)

        @torch.no_grad()
        def encode(indices: list[int]) -> Tensor:
            videos = to_unit_range(scenes.collate(indices)["image"])
            return ((encoded_images(vae, videos.to(device)).cpu() - mean) / std).half()

        keep = run.path / "parts"
        latents = map_batches(encode, config.scenes, config.batch_size, self.accelerator, "encoding videos", keep)
        if self.accelerator.is_main_process:
            ids_NL = self.video_ids([pairs.caption(index) for index in range(config.scenes)])
            write_tensors(run.path / "latents.safetensors", {"latents": latents, "ids": ids_NL.short()})
        self.accelerator.wait_for_everyone()

    def video_model(self) -> TextToVideoFlow:
        torch.manual_seed(self.config.seed)
        return TextToVideoFlow(self.config.video, self.video_tokenizer, self.config.video_vae.model.z_dim)

    def video(self) -> None:
        """At a constant learning rate as long as `train.steps` says, then down to zero in `decay.steps` more."""
        config, run = self.config.video, self.run("video")
        model = self.video_model()
        load_newest(CaptionReader(model.text, NUM_CLASSES), self.root / "video_text" / "train")
        empty_ids_L = self.video_ids([""])[0].to(self.accelerator.device)
        schedule = schedule_of(build_flow_scheduler())
        objective = FlowObjective(schedule, empty_ids_L, config.caption_dropout, config.padding, config.padded_share)
        latents = CachedScenes(self.root / "video_latents" / "latents.safetensors")
        for stage in ("train", "decay"):
            train(model, objective, latents, TrainConfig(**plain(config[stage])), run, stage)

    def export_video(self) -> None:
        """Whatever of it is trained so far, as a pipeline folder of the assets."""
        if not self.accelerator.is_main_process:
            return
        model = self.video_model()
        for stage in ("train", "decay"):
            load_newest(model, self.root / "video" / stage)
        pipeline = build_video_pipeline(model, self.trained_video_vae(), self.config.video)
        save_pipeline(pipeline, self.shipped.with_name("shapes-video"))

    def evaluate_video(self) -> None:
        if self.accelerator.is_main_process:
            folder = self.root / "evaluation-video"
            report = evaluate_video(self.shipped.with_name("shapes-video"), self.config.video.evaluate, folder)
            write_json(folder / "report.json", report)
            print(json.dumps(report, indent=1))
