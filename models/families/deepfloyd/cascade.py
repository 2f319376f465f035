"""DeepFloyd IF's second stage behind its first: the picture that it makes larger, where that comes from, and its noise.

Axes: B batch, H and W height and width of the second stage, h and w of the first, L tokens, E text width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from slimstep.engine.quiet import quiet
from slimstep.models.checkpoint import is_single_file
from slimstep.models.families.deepfloyd.family import NOT_NEEDED, PARTS, TEXT_PARTS, check_parts, matches, read_without

SECOND = "IFSuperResolutionPipeline"
DEFAULTS = {"steps": 50, "guidance_scale": 7.0, "noise_level": 250}  # the last is IFSuperResolutionPipeline's


@dataclass(eq=False)
class FirstStage:
    """An IFPipeline that draws what a second stage refines, in `steps` at its own guidance scale, whatever the second
    stage does; it takes the second's text states. `noise_level`: of its pictures, as the second stage is shown them.
    `pictures` holds those drawn: {(seed, number, text, precision): [3, h, w]}."""

    path: str
    pipeline: DiffusionPipeline
    steps: int
    guidance_scale: float
    noise_level: int
    pictures: dict[tuple, Tensor] = field(default_factory=dict)

    @property
    def protocol(self) -> dict[str, Any]:
        """What the pictures depend on beside the text and the seed."""
        facts = {"steps": self.steps, "guidance_scale": self.guidance_scale, "noise_level": self.noise_level}
        return {"path": self.path, "scheduler": type(self.pipeline.scheduler).__name__, **facts}


def load_first_stage(
    second: DiffusionPipeline, described: Mapping[str, Any], dtype: torch.dtype | None, variant: str | None,
    allow_pickle: bool,
) -> FirstStage:  # fmt: skip
    """The first stage of a pipeline, without its text encoder. ValueError where the two do not go together."""
    kind = type(second).__name__
    options = checked_options(kind, described)
    path, steps, noise_level = options["path"], options["steps"], options["noise_level"]
    name = f"model.first_stage.path={path}"
    with quiet():
        pipeline = read_without((*TEXT_PARTS, *NOT_NEEDED), path, dtype, variant, allow_pickle)
    widths = [p.unet.config.encoder_hid_dim or p.unet.config.cross_attention_dim for p in (pipeline, second)]
    if widths[0] != widths[1]:
        raise ValueError(f"{name} reads text states of width {widths[0]}, and {kind} of {widths[1]}: not one cascade")
    levels = second.image_noising_scheduler.config.num_train_timesteps
    if steps < 1 or not 0 <= noise_level < levels:
        raise ValueError(f"model.first_stage has steps={steps} and noise_level={noise_level}; these must be 1 or more, "
                         f"and from 0 to {levels - 1}")  # fmt: skip
    pipeline.unet.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return FirstStage(str(path), pipeline, steps, options["guidance_scale"], noise_level)


def checked_options(kind: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """What `described` says of the stage before a pipeline of this class, with defaults. ValueError where that is no
    first stage."""
    unknown = sorted({*described} - {"path", *DEFAULTS})
    if unknown or "path" not in described:
        which = f"has {unknown}" if unknown else "lacks a path"
        raise ValueError(f"model.first_stage={dict(described)} {which}; it is {{path: FOLDER_OR_ID}} with {DEFAULTS}")
    path = described["path"]
    name = f"model.first_stage.path={path}"
    if kind != SECOND:
        raise ValueError(f"{name}: a {kind} has no stage before it; it is for an {SECOND}")
    index = DiffusionPipeline.load_config(path)
    if not matches(index) or index["_class_name"] != "IFPipeline":
        raise ValueError(f"{name} is a {index.get('_class_name')}; the first stage is an IFPipeline")
    check_parts(path, PARTS)
    return {**DEFAULTS, **described}


def check_cascade(name_or_path: str, first_stage: Mapping[str, Any] | None) -> None:
    """ValueError, before anything is loaded, for a second stage without a first, and a first that is none or is for
    another kind of pipeline."""
    kind = "single file" if is_single_file(name_or_path) else DiffusionPipeline.load_config(name_or_path)["_class_name"]
    if first_stage:
        checked_options(kind, first_stage)
    elif kind == SECOND:
        raise no_first_stage()


def no_first_stage() -> ValueError:
    way = "model.first_stage={path: FOLDER, steps: 50, guidance_scale: 7} names the IFPipeline that draws them"
    return ValueError(f"an {SECOND} makes pictures larger: {way}")


def refines(pipeline: DiffusionPipeline) -> bool:
    """Whether it is a second stage."""
    return type(pipeline).__name__ == SECOND


def upscaled(pipeline: DiffusionPipeline, pictures: Tensor, noise: Tensor, level_B: Tensor) -> dict[str, Tensor]:
    """What a second stage is conditioned on for pictures [B, 3, h, w] and unit noise [B, 3, H, W], as its call does."""
    large = F.interpolate(pictures, tuple(noise.shape[-2:]), mode="bilinear", align_corners=True)
    return {"upscaled": pipeline.image_noising_scheduler.add_noise(large, noise, level_B), "noise_level": level_B}


def degraded(pipeline: DiffusionPipeline, side: int, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The same of images [B, 3, H, W] that a second stage learns from: shrunk to what the first stage would draw, of
    this side, by the mean of what falls together, and noised at random levels (Ho et al. 2022, section 4)."""
    place = {"generator": generator, "device": images.device}
    levels = pipeline.image_noising_scheduler.config.num_train_timesteps
    level_B = torch.randint(levels, (len(images),), **place)
    small = F.interpolate(images, (side, side), mode="area")
    return upscaled(pipeline, small, torch.randn(images.shape, **place), level_B)


def first_stage_of(pipeline: DiffusionPipeline) -> FirstStage:
    """ValueError for a second stage that was loaded without one."""
    if (stage := pipeline.__dict__.get("first_stage")) is None:
        raise no_first_stage()
    return stage

