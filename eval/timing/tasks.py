"""The pipelines that people run around one UNet: txt2img, img2img, inpaint, ControlNet, two ControlNets."""

import math
from typing import Any

import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image

from slimstep.engine.resolution import sides
from slimstep.engine.seeding import generator, seed_of
from slimstep.eval.timing.inference import CannotRunError
from slimstep.models.family import family_of
from slimstep.models.networks import sequence_length, with_sequence_length
from slimstep.models.pipeline import quiet
from slimstep.models.sizes import native_pixels

TASKS = ("txt2img", "img2img", "inpaint", "controlnet", "two_controlnets")
STRENGTH = 0.75  # of img2img and inpaint: the share of the steps that are taken
CONDITIONING_CHANNELS = (16, 32, 96, 256)


def task_pipeline(pipeline: DiffusionPipeline, task: str, batch: int) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """The pipeline for a task around these networks, and what its call is given beside prompts.

    ControlNets have the shape of the UNet's encoder as it is when no block is removed, and random weights: they are
    there for their time. Raises ValueError for an unknown task, and CannotRunError where the pipeline has no such one.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; choose from {TASKS}")
    size = sides(native_pixels(pipeline))
    try:
        made, kwargs = made_for(pipeline, task, batch, size)
    except ValueError as error:  # of diffusers, which has none of this class
        raise CannotRunError(f"diffusers has no {task} of a {type(pipeline).__name__}") from error
    return with_sequence_length(made, sequence_length(pipeline)), kwargs


def made_for(
    pipeline: DiffusionPipeline, task: str, batch: int, size: tuple[int, int]
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    pictures = [random_picture(*size, index) for index in range(batch)]
    with quiet():
        if task == "txt2img":
            return pipeline, {}
        if task == "img2img":
            return AutoPipelineForImage2Image.from_pipe(pipeline), {"image": pictures, "strength": STRENGTH}
        if task == "inpaint":
            masks = [half_mask(*size)] * batch
            kwargs = {"image": pictures, "mask_image": masks, "strength": STRENGTH}
            return AutoPipelineForInpainting.from_pipe(pipeline), kwargs
        if task == "controlnet":
            controlled = AutoPipelineForText2Image.from_pipe(pipeline, controlnet=random_controlnet(pipeline, 0))
            return controlled, {"image": pictures}
        two = MultiControlNetModel([random_controlnet(pipeline, k) for k in range(2)])
        return AutoPipelineForText2Image.from_pipe(pipeline, controlnet=two), {"image": [pictures[0], pictures[0]]}


def random_controlnet(pipeline: DiffusionPipeline, seed: int) -> ControlNetModel:
    """One that fits the pipeline's UNet, frozen. Raises CannotRunError where it has none of latents of images."""
    network = getattr(pipeline, "unet", None)
    if not isinstance(network, UNet2DConditionModel) or not family_of(pipeline).codec(pipeline):
        kind = type(pipeline).__name__
        raise CannotRunError(f"random ControlNets are made for UNets of latents of images, not for a {kind}")
    torch.manual_seed(seed_of("controlnet", seed))
    halvings = int(math.log2(pipeline.vae_scale_factor))  # from the control image down to the latents
    controlnet = ControlNetModel.from_unet(
        network,
        conditioning_embedding_out_channels=CONDITIONING_CHANNELS[: halvings + 1],
        load_weights_from_unet=False,
    )
    return controlnet.eval().requires_grad_(False)


def random_picture(height: int, width: int, index: int) -> Image.Image:
    pixels_HW3 = torch.randint(0, 256, (height, width, 3), generator=generator("picture", index), dtype=torch.uint8)
    return Image.fromarray(pixels_HW3.numpy())


def half_mask(height: int, width: int) -> Image.Image:
    """White, to be repainted, on the right half."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask
