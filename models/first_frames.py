"""Pipelines that make a video of its first frame: a prompt is the name of one, which the pipeline remembers.

What a frame becomes for the network, a family says (families/svd/conditions.py, families/transformer/cogvideox.py).

Axes: H and W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from slimstep.engine.seeding import generator

SVD = "StableVideoDiffusionPipeline"
PIPELINES = (SVD, "CogVideoXImageToVideoPipeline")
NOISE = "noise_aug_strength"


def begins_with_frame(pipeline: Any) -> bool:
    """Whether a pipeline makes videos of their first frame."""
    return type(pipeline).__name__ in PIPELINES


def with_first_frames(pipeline: DiffusionPipeline, frames: Mapping[str, Tensor]) -> DiffusionPipeline:
    """The same pipeline, which remembers these first frames too, uint8 [H, W, 3], by the names that stand for
    prompts."""
    pipeline.__dict__["first_frames"] = {**pipeline.__dict__.get("first_frames", {}), **frames}
    return pipeline


def first_frames(pipeline: DiffusionPipeline, names: Sequence[str]) -> list[Tensor]:
    """Those that the pipeline remembers by these names, uint8 [H, W, 3]. ValueError for a name of none."""
    frames = pipeline.__dict__.get("first_frames", {})
    if unknown := [name for name in names if name not in frames]:
        raise ValueError(f"a {type(pipeline).__name__} begins with a frame, and none is called {unknown[0]!r}: "
                         "data.first_frames=FOLDER has images, and with_first_frames names them")  # fmt: skip
    return [frames[name] for name in names]


def with_noise(
    pipeline: DiffusionPipeline, picture: Image.Image, strength: float, noise: torch.Generator
) -> Tensor:
    """[1, 3, H, W], from -1 to 1: a picture with unit noise times `strength`."""
    pixels = pipeline.video_processor.preprocess(picture, picture.height, picture.width)
    return pixels + strength * torch.randn(pixels.shape, generator=noise)


def noise_source(picture: Image.Image) -> torch.Generator:
    """What noise a frame is given: a function of its pixels alone."""
    return generator("first frame", picture.tobytes().hex())


# ---- what is said beside a frame ----


@dataclass(frozen=True)
class VideoOptions:
    """What Stable Video Diffusion's call is given beside a first frame; the defaults are its own. `decode_chunk_size`:
    frames that the decoder takes at once, null for all of a video. CogVideoX has `noise_aug_strength` alone, 0 by
    default, and in training alone: its pipeline's call gives a frame no noise."""

    fps: int = 7
    motion_bucket_id: int = 127
    noise_aug_strength: float = 0.02
    decode_chunk_size: int | None = None

    @classmethod
    def default(cls, pipeline: str) -> "VideoOptions":
        """Of a pipeline of this class."""
        return cls() if pipeline == SVD else cls(noise_aug_strength=0.0)

    @classmethod
    def of(cls, described: Mapping[str, Any], pipeline: str = SVD) -> "VideoOptions":
        """ValueError for what `model.video` of a pipeline of this class cannot be."""
        names = asdict(cls()) if pipeline == SVD else (NOISE,)
        if unknown := sorted({*described} - {*names}):
            raise ValueError(f"model.video={dict(described)} has {unknown}; it may have {', '.join(names)}")
        options = replace(cls.default(pipeline), **described)
        chunk = options.decode_chunk_size
        counts = {"fps": options.fps, "decode_chunk_size": 1 if chunk is None else chunk}
        if low := [f"{name}={value}" for name, value in counts.items() if value < 1]:
            raise ValueError(f"model.video.{low[0]} must be at least 1")
        strengths = {"motion_bucket_id": options.motion_bucket_id, "noise_aug_strength": options.noise_aug_strength}
        if low := [f"{name}={value}" for name, value in strengths.items() if value < 0]:
            raise ValueError(f"model.video.{low[0]} must be at least 0")
        return options

    @property
    def time_ids(self) -> list[float]:
        """As the network was trained: with one frame a second less."""
        return [self.fps - 1.0, self.motion_bucket_id, self.noise_aug_strength]


def video_options(pipeline: DiffusionPipeline) -> VideoOptions:
    return pipeline.__dict__.get("video_options") or VideoOptions.default(type(pipeline).__name__)


def call_options(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Those that the stock pipeline's call is given."""
    return asdict(video_options(pipeline)) if type(pipeline).__name__ == SVD else {}


def with_video_options(pipeline: DiffusionPipeline, described: Mapping[str, Any] | None) -> DiffusionPipeline:
    """The same pipeline, which remembers them. ValueError for options of a pipeline that has none, or not these."""
    if described is None:
        return pipeline
    if not begins_with_frame(pipeline):
        raise ValueError(f"model.video={dict(described)} is for a {' or a '.join(PIPELINES)}, and this is a "
                         f"{type(pipeline).__name__}")  # fmt: skip
    pipeline.__dict__["video_options"] = VideoOptions.of(described, type(pipeline).__name__)
    return pipeline
