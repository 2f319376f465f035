"""What Stable Video Diffusion is conditioned on, as its pipeline's call makes it of a video's first frame.

    "image"          the frame's embedding by the image encoder [B, 1, E]
    "image_latents"  the latents of the frame with noise, not scaled [B, C, h, w]
    "time_ids"       frames a second − 1, the motion bucket, and how strong that noise is [B, 3]

Guidance steers away from a frame whose embedding and latents are zeros. The noise of a frame is a function of its
pixels alone. A prompt is the name of a first frame: a pipeline remembers the frames by their names.

Axes: B batch, C channels, H and W pixels (h and w latents), E width of an embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from slimstep.engine.seeding import generator
from slimstep.models.conditioning import Conditioning
from slimstep.models.decoding import encoded_images
from slimstep.models.sizes import sides_of


@dataclass(frozen=True)
class VideoOptions:
    """What the pipeline's call is given beside a first frame; the defaults are its own. `decode_chunk_size`: frames
    that the decoder takes at once, null for all of a video."""

    fps: int = 7
    motion_bucket_id: int = 127
    noise_aug_strength: float = 0.02
    decode_chunk_size: int | None = None

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> "VideoOptions":
        """ValueError for what `model.video` cannot be."""
        if unknown := sorted({*described} - {*asdict(cls())}):
            raise ValueError(f"model.video={dict(described)} has {unknown}; it may have {', '.join(asdict(cls()))}")
        options = cls(**described)
        counts = {"fps": options.fps, "decode_chunk_size": options.decode_chunk_size or 1}
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


def begins_with_frame(pipeline: Any) -> bool:
    """Whether a pipeline makes videos of their first frame."""
    return type(pipeline).__name__ == "StableVideoDiffusionPipeline"


def video_options(pipeline: DiffusionPipeline) -> VideoOptions:
    return pipeline.__dict__.get("video_options") or VideoOptions()


def with_video_options(pipeline: DiffusionPipeline, described: Mapping[str, Any] | None) -> DiffusionPipeline:
    """The same pipeline, which remembers them. ValueError for options of a pipeline that has none."""
    if described is None:
        return pipeline
    if not begins_with_frame(pipeline):
        raise ValueError(f"model.video={dict(described)} is for a StableVideoDiffusionPipeline, and this is a "
                         f"{type(pipeline).__name__}")  # fmt: skip
    pipeline.__dict__["video_options"] = VideoOptions.of(described)
    return pipeline


def with_first_frames(pipeline: DiffusionPipeline, frames: Mapping[str, Tensor]) -> DiffusionPipeline:
    """The same pipeline, which remembers these first frames too, uint8 [H, W, 3], by the names that stand for
    prompts."""
    pipeline.__dict__["first_frames"] = {**pipeline.__dict__.get("first_frames", {}), **frames}
    return pipeline


def conditions_of_names(pipeline: DiffusionPipeline, names: Sequence[str]) -> Conditioning:
    """A row for each first frame, by its name."""
    return conditions_of(pipeline, first_frames(pipeline, names))


def first_frames(pipeline: DiffusionPipeline, names: Sequence[str]) -> list[Tensor]:
    """Those that the pipeline remembers by these names, uint8 [H, W, 3]. ValueError for a name of none."""
    frames = pipeline.__dict__.get("first_frames", {})
    if unknown := [name for name in names if name not in frames]:
        raise ValueError(f"a {type(pipeline).__name__} begins with a frame, and none is called {unknown[0]!r}: "
                         "data.first_frames=FOLDER has images, and with_first_frames names them")  # fmt: skip
    return [frames[name] for name in names]


@torch.no_grad()
def conditions_of(pipeline: DiffusionPipeline, frames: Sequence[Tensor]) -> Conditioning:
    """A row for each frame, uint8 [H, W, 3], where the image encoder is; one by one, so that its bits do not depend on
    the others."""
    device, time_ids = pipeline.image_encoder.device, torch.tensor([video_options(pipeline).time_ids])

    def of(frame: Tensor) -> Conditioning:
        picture = Image.fromarray(frame.cpu().numpy())
        image, latents = pipeline._encode_image(picture, device, 1, False), noisy_latents(pipeline, picture)
        return Conditioning({"image": image, "image_latents": latents, "time_ids": time_ids}).to(device)

    return Conditioning.cat(*map(of, frames))


def noisy_latents(pipeline: DiffusionPipeline, picture: Image.Image) -> Tensor:
    """[1, C, h, w]: what the VAE encodes of a frame with its noise."""
    vae, strength = pipeline.vae, video_options(pipeline).noise_aug_strength
    pixels = pipeline.video_processor.preprocess(picture, picture.height, picture.width)
    noise = torch.randn(pixels.shape, generator=noise_source(picture))
    return encoded_images(vae, (pixels + strength * noise).to(vae.device, vae.dtype))


def noise_source(picture: Image.Image) -> torch.Generator:
    return generator("first frame", picture.tobytes().hex())


def nothing(pipeline: DiffusionPipeline) -> Conditioning:
    """What guidance steers away from, one row."""
    unet, encoder = pipeline.unet, pipeline.image_encoder
    channels = unet.config.in_channels - unet.config.out_channels
    tensors = {
        "image": torch.zeros(1, 1, encoder.config.projection_dim),
        "image_latents": torch.zeros(1, channels, *sides_of(unet.config)),
        "time_ids": torch.tensor([video_options(pipeline).time_ids]),
    }
    return Conditioning(tensors).to(encoder.device)
