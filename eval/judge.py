"""The judgement of one UNet in a pipeline: its images of a prompt set, and their CLIP scores, prompt by prompt.

Axes: B images, D feature width, H and W pixels.
"""

from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from slimstep.data.prompts import PromptSet
from slimstep.engine.parallel import map_batches
from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.sampling import Sampler


def draw_images(
    name: str,
    unet: nn.Module,
    sampler: Sampler,
    prompts: PromptSet,
    batch_size: int,
    accelerator: Accelerator,
    keep: Path | None = None,
) -> Tensor:
    """uint8 images [len(prompts), 3, H, W] of all prompts, each from its own noise, shared among the processes.

    Finished batches lie under `keep` until all are there.
    """
    draw = partial(sampler.images, unet, prompts.prompts)
    return map_batches(draw, len(prompts), batch_size, accelerator, f"images of {name}", keep)


def clip_scores(
    images_B3HW: Tensor, text_BD: Tensor, scorer: ClipScorer, batch_size: int, accelerator: Accelerator
) -> Tensor:
    """The score of every image against its own prompt's features, float32 [B]."""

    def rate(indices: list[int]) -> Tensor:
        return scorer.score(images_B3HW[indices], text_BD[indices])

    return map_batches(rate, len(images_B3HW), batch_size, accelerator, "CLIP")


def write_pictures(images_B3HW: Tensor, folder: Path) -> None:
    """The images as FOLDER/000.png, 001.png, …"""
    for i, image in enumerate(images_B3HW):
        to_pil_image(image).save(folder / f"{i:03d}.png")
