"""Pictures that a pipeline is given beside a caption, or in its place: a video's first frame, and what the second stage
of a cascade makes larger. Each becomes its conditions within the encoder's graph of a package.

Axes: B rows, C channels, H and W pixels (h and w latents, or the pixels of a first stage).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from PIL import Image
from torch import Tensor, nn

from slimstep.engine.resolution import sides
from slimstep.engine.seeding import generator
from slimstep.eval.sampling import Sampler
from slimstep.models.decoding import encoded_images
from slimstep.models.families.deepfloyd.cascade import first_stage_of, refines, upscaled
from slimstep.models.families.transformer.cogvideox import FRAME, frame_scaling
from slimstep.models.first_frames import SVD, begins_with_frame, first_frames, noise_source, video_options
from slimstep.models.sizes import native_pixels, sides_of

FIRST = "a video's first frame"
Conditions = Callable[[Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Picture:
    """A picture [1, 3, H, W] from −1 to 1 of these `sides`, and its unit noise [1, *noise], become `conditions`, by the
    weights of `modules`. `what`: as errors call it."""

    what: str
    sides: tuple[int, int]
    noise: tuple[int, ...]
    conditions: Conditions
    modules: Mapping[str, nn.Module]


def picture_of(sampler: Sampler) -> Picture | None:
    """None of a pipeline that is given none."""
    pipeline = sampler.pipeline
    if refines(pipeline):
        return low_resolution(sampler)
    if not begins_with_frame(pipeline):
        return None
    return frame_of_svd(sampler) if type(pipeline).__name__ == SVD else frame_of_cogvideox(sampler)


def low_resolution(sampler: Sampler) -> Picture:
    """What the first stage of a cascade draws."""
    pipeline, stage = sampler.pipeline, first_stage_of(sampler.pipeline)

    def conditions(picture_13hw: Tensor, noise_13HW: Tensor) -> dict[str, Tensor]:
        level_1 = torch.full((1,), stage.noise_level, device=noise_13HW.device)
        return upscaled(pipeline, picture_13hw, noise_13HW, level_1)

    small = sides_of(stage.pipeline.unet.config)
    return Picture("the picture of the first stage", small, sampler.latent_shape, conditions, {})


def frame_of_svd(sampler: Sampler) -> Picture:
    """As families/svd/conditions.py has it of a file's pixels."""
    pipeline: Any = sampler.pipeline
    vae, encoder, processor = pipeline.vae, pipeline.image_encoder, pipeline.feature_extractor
    options, pixels = video_options(pipeline), sides(native_pixels(pipeline))
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (processor.image_mean, processor.image_std))

    def conditions(picture_13HW: Tensor, noise_13HW: Tensor) -> dict[str, Tensor]:
        seen = (_resize_with_antialiasing(picture_13HW, (224, 224)) + 1) / 2
        seen = (seen - mean.to(seen)) / std.to(seen)
        noisy = picture_13HW + options.noise_aug_strength * noise_13HW
        return {
            "image": encoder(seen.to(encoder.dtype)).image_embeds[:, None],
            "image_latents": encoded_images(vae, noisy.to(vae.dtype)),
            "time_ids": torch.tensor([options.time_ids], device=seen.device),
        }

    modules = {"image_encoder": encoder, **encoding_half(vae)}
    return Picture(FIRST, pixels, (3, *pixels), conditions, modules)


def frame_of_cogvideox(sampler: Sampler) -> Picture:
    """As families/transformer/cogvideox.py has it of a file's pixels."""
    pipeline: Any = sampler.pipeline
    vae = pipeline.vae

    def conditions(picture_13HW: Tensor, noise_1Chw: Tensor) -> dict[str, Tensor]:
        posterior = vae.encode(picture_13HW[:, :, None].to(vae.dtype)).latent_dist
        drawn = posterior.mean + posterior.std * noise_1Chw[:, :, None].to(vae.dtype)
        return {FRAME: frame_scaling(vae) * drawn[:, :, 0]}

    channels, _, *latents = sampler.latent_shape
    pixels = sides(native_pixels(pipeline))
    return Picture(FIRST, pixels, (channels, *latents), conditions, encoding_half(vae))


def encoding_half(vae: Any) -> dict[str, nn.Module]:
    parts = {name: getattr(vae, name, None) for name in ("encoder", "quant_conv")}
    return {name: part for name, part in parts.items() if part is not None}


# ---- what a sampler draws from ----


def chosen(sampler: Sampler, prompt: str) -> tuple[Tensor, Tensor]:
    """The picture [3, H, W] from −1 to 1, and its unit noise, that a sampler has for image 0 of a prompt."""
    pipeline = sampler.pipeline
    if refines(pipeline):
        pictures = first_stage_of(pipeline).pictures
        pictures.clear()
        sampler.conditions([prompt], [0])
        (picture,) = pictures.values()
        return picture, torch.randn(sampler.latent_shape, generator=generator("upscaled", sampler.seed, 0))
    (frame,) = first_frames(pipeline, [prompt])
    made = picture_of(sampler)
    assert made is not None
    noise = torch.randn(made.noise, generator=noise_source(Image.fromarray(frame.cpu().numpy())))
    return frame.permute(2, 0, 1).float() / 127.5 - 1, noise
