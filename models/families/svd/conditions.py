"""What Stable Video Diffusion is conditioned on, as its pipeline's call makes it of a video's first frame.

    "image"          the frame's embedding by the image encoder [B, 1, E]
    "image_latents"  the latents of the frame with noise, not scaled [B, C, h, w]
    "time_ids"       frames a second − 1, the motion bucket, and how strong that noise is [B, 3]

Guidance steers away from a frame whose embedding and latents are zeros. A prompt is the name of a first frame
(models/first_frames.py).

Axes: B batch, C channels, H and W pixels (h and w latents), E width of an embedding.
"""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from slimstep.models.conditioning import Conditioning
from slimstep.models.decoding import encoded_images
from slimstep.models.first_frames import first_frames, noise_source, video_options, with_noise
from slimstep.models.sizes import sides_of


def conditions_of_names(pipeline: DiffusionPipeline, names: Sequence[str]) -> Conditioning:
    """A row for each first frame, by its name."""
    return conditions_of(pipeline, first_frames(pipeline, names))


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
    pixels = with_noise(pipeline, picture, strength, noise_source(picture))
    return encoded_images(vae, pixels.to(vae.device, vae.dtype))


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
