"""What a decoder is pruned by, learns from and is evaluated on: latents that the teacher samples, and those of images.

Axes: P latents, F frames, H and W height and width. What is written P3HW of images is PFHW3 of videos.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from diffusers import ModelMixin
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import Dataset

from slimstep.data.encoding import encode_images
from slimstep.data.first_frames import frames_of_videos
from slimstep.data.latents import LatentMix
from slimstep.data.pixels import shown
from slimstep.data.prompts import PromptSet, heldout_prompts, read_prompts
from slimstep.data.streams import readable
from slimstep.engine import components
from slimstep.engine.parallel import map_batches
from slimstep.engine.run import Run
from slimstep.eval.config import LatentsConfig
from slimstep.eval.evaluator import PARTIAL
from slimstep.eval.inputs import Teacher, numbered_images
from slimstep.eval.latents import sampled_latents
from slimstep.models.first_frames import with_first_frames
from slimstep.models.pipeline import to_device
from slimstep.models.sizes import latents_together
from slimstep.prune.config import DecoderConfig

HELDOUT = "heldout.safetensors"
TRAINING = "training video: "  # before the caption of one whose first frame latents are sampled from


@dataclass(frozen=True)
class DecoderPruning:
    """What all steps of the job share: the teacher, whose decoder is frozen, what the configuration says, the widths
    that follow; images that nothing is trained on; and the prompts that latents are sampled from, None where all
    latents are those of images."""

    teacher: Teacher
    run: Run
    vae: ModelMixin
    decoder: DecoderConfig
    latents: LatentsConfig
    widths: tuple[int, ...]
    heldout_pairs: Dataset
    prompts: PromptSet | None

    @property
    def latents_at_once(self) -> int | None:
        """Latents of a video that are decoded together; None of images."""
        return latents_together(self.teacher.pipeline, self.decoder.frames)


def parts(latents: LatentsConfig, r: int) -> tuple[int, int]:
    """How many sampled latents and how many encoded images round r learns from."""
    total = -(-latents.count * (r + 1) // latents.rounds)
    real = round(total * latents.real_share)
    return total - real, real


def training_prompts(teacher: Teacher) -> PromptSet | None:
    """The captions of training images, or those of a file, or first frames; None where no latents are sampled."""
    config, latents = teacher.config, OmegaConf.to_object(teacher.config.latents)
    if parts(latents, latents.rounds - 1)[0] == 0:
        return None
    if teacher.begins_with_frame:
        return training_frames(teacher, latents)
    if latents.prompt_file:
        prompts = read_prompts(latents.prompt_file, latents.prompt_column, "latents.prompt_column")
        return prompts.take(latents.prompts, way=f"latents.prompts={len(prompts)} or fewer, or a longer file")
    return heldout_prompts(components.component(config, "data.pairs"), latents.prompts, name="training captions")


def training_frames(teacher: Teacher, latents: LatentsConfig) -> PromptSet:
    """The first frames of training videos, which the pipeline remembers."""
    if latents.prompt_file:
        why = "this model makes videos of first frames, those of training videos"
        raise ValueError(f"latents.prompt_file={latents.prompt_file} has captions, and {why}")
    if teacher.config.plan:
        return numbered_images(latents.prompts)
    frames = frames_of_videos(components.component(teacher.config, "data.pairs"), latents.prompts)
    if len(frames) < latents.prompts:
        few = f"latents.prompts={latents.prompts} first frames were asked for, of videos with captions of their own"
        raise ValueError(f"{few}, and {len(frames)} can be read: latents.prompts={max(1, len(frames))} or fewer")
    # A held-out video may have the caption of one of these.
    own = {f"{TRAINING}{caption}": frame for caption, frame in frames.items()}
    with_first_frames(teacher.pipeline, own)
    return PromptSet(tuple(own), "first frames of training videos")


def latent_mix(job: DecoderPruning, r: int, data: Callable[[], Dataset]) -> LatentMix:
    """What round r learns from: its sampled latents, from the cache or made now, and its encoded images."""
    teacher, size, folder = job.teacher, job.latents.batch_size, Path(job.teacher.config.data.cache.folder)
    (num_sampled, num_real), sampled = parts(job.latents, r), ()
    if num_sampled:
        to_device(teacher.pipeline, teacher.device)
        sampler = teacher.sampler(job.latents)
        sampled = sampled_latents(sampler, teacher.unet, job.prompts, num_sampled, size, folder, job.run.accelerator)
    return LatentMix(sampled, num_sampled, data() if num_real else (), num_real)


def heldout(job: DecoderPruning, prompts: PromptSet) -> dict[str, Tensor]:
    """What decoders are evaluated on: `sampled` latents of the eval prompts, `real` ones of held-out images, and those
    images, uint8 [P, 3, H, W], or videos [P, F, H, W, 3]."""
    run, teacher, config = job.run, job.teacher, job.teacher.config.eval

    def make() -> dict[str, Tensor]:
        real = heldout_images(job, len(prompts)) if run.accelerator.is_main_process else {}
        to_device(teacher.pipeline, teacher.device)
        sampler = teacher.sampler(config)

        def draw(indices: list[int]) -> Tensor:
            cond = sampler.encode(prompts.prompts).rows(indices)
            return sampler.latents_at(teacher.unet, cond, indices).float()

        size, keep = len(prompts), run.path / PARTIAL / "heldout"
        sampled = map_batches(draw, size, config.batch_size, run.accelerator, "held-out latents", keep)
        return {"sampled": sampled, **real}

    return run.tensors(HELDOUT, make)


def heldout_images(job: DecoderPruning, count: int) -> dict[str, Tensor]:
    """Up to `count` held-out images that can be read, in a fixed shuffled order, and their latents."""
    teacher, pairs = job.teacher, readable(job.heldout_pairs, "held-out images")
    images = [shown(pair) for pair in islice(pairs, count)]
    if len(images) < 2:
        reason = f"{len(images)} held-out images can be read; a decoder is evaluated on 2 and more"
        raise ValueError(f"{reason}: repair them, or a higher data.heldout_fraction")
    images_P3HW = torch.stack(images)
    latents = [
        encode_images(teacher.pipeline, batch, teacher.device)["latents"].float().cpu()
        for batch in images_P3HW.split(teacher.config.data.cache.batch_size)
    ]
    return {"real": torch.cat(latents), "images": images_P3HW}
