"""What a job begins with: its teacher, prompts, a scorer, and the data that it trains on."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset

from slimstep.data.cache import cache_pairs
from slimstep.data.config import CacheConfig
from slimstep.data.encoding import check_size, is_truncated
from slimstep.data.first_frames import captioned_frames_in_folder, frames_in_folder, frames_of_videos
from slimstep.data.folder import few
from slimstep.data.pixels import shown
from slimstep.data.prompts import MORE_PROMPTS, PromptSet, disjoint_prompts, read_prompts
from slimstep.data.shards import CachedPairs
from slimstep.data.streams import at_random_access, readable
from slimstep.engine.checks import check_minimum
from slimstep.engine.components import component
from slimstep.engine.resolution import sides
from slimstep.engine.run import Run
from slimstep.engine.sharding import autocast_dtype
from slimstep.eval.config import Config, LatencyConfig, SamplingConfig
from slimstep.eval.metrics.clip import WITHOUT_SCORER, ClipScorer
from slimstep.eval.metrics.metric import FeatureDistance, ImageError, Metric, PixelDistance, as_metric
from slimstep.eval.metrics.video import on_videos, video_metrics
from slimstep.eval.overlap import among
from slimstep.eval.sampling import Sampler
from slimstep.eval.timing.precision import settled
from slimstep.models.denoiser import NUM_TOKENS
from slimstep.models.described import no_weights
from slimstep.models.families.prunable import Prunable
from slimstep.models.family import family_of, schedule_for
from slimstep.models.first_frames import begins_with_frame, with_first_frames
from slimstep.models.networks import DENOISERS, network_of, trained_steps_of
from slimstep.models.noise_schedule import NoiseSchedule, are_among
from slimstep.models.pipeline import networks, to_device, upcast_vae
from slimstep.models.sizes import native_frames, native_pixels, set_resolution

log = logging.getLogger("slimstep")
TRAINED_ON = "trained_on.json"
MORE_FRAMES = "data.first_frames=FOLDER gives others, of which no video is needed"


@dataclass(frozen=True)
class Teacher:
    """A job's teacher: a pipeline, frozen, on the device but for its text encoders (models/pipeline.py), whose UNet is
    prunable; or, for what needs no more than that, a UNet alone. `config` is the job's, with the resolution that the
    data left open."""

    pipeline: DiffusionPipeline | Prunable
    config: Config
    run: Run

    @property
    def unet(self) -> Prunable:
        parts = [part for part in DENOISERS if hasattr(self.pipeline, part)]
        return getattr(self.pipeline, parts[0]) if parts else self.pipeline

    @property
    def is_conditional(self) -> bool:
        """Whether prompts are captions."""
        return family_of(self.pipeline).IS_CONDITIONAL

    @property
    def begins_with_frame(self) -> bool:
        """Whether first frames stand in the place of prompts."""
        return begins_with_frame(self.pipeline)

    @property
    def has_captions(self) -> bool:
        """Whether it can be said how what is drawn fits a text: to prompts, or to the captions of first frames."""
        return self.is_conditional or (self.begins_with_frame and not self.config.data.first_frames)

    @property
    def draws_videos(self) -> bool:
        return family_of(self.pipeline).DRAWS_VIDEOS

    @property
    def device(self) -> torch.device:
        return self.run.accelerator.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """What mixed precision computes in."""
        return autocast_dtype(self.run.accelerator)

    @property
    def precision(self) -> str:
        """What all images are drawn in. ValueError where the device has no such thing."""
        return settled(self.config.sampling.precision, self.device)

    @property
    def schedule(self) -> NoiseSchedule:
        return schedule_for(self.pipeline, device=self.device)

    @property
    def text_length(self) -> int:
        """Tokens of a prompt: the model's own, 77 for a network alone."""
        has_text = isinstance(self.pipeline, DiffusionPipeline)
        return family_of(self.pipeline).tokens(self.pipeline) if has_text else NUM_TOKENS

    @property
    def latency(self) -> LatencyConfig:
        config = OmegaConf.to_object(self.config.latency)
        return replace(config, text_length=config.text_length or self.text_length)

    def sampler(self, settings: SamplingConfig, pipeline: DiffusionPipeline | None = None) -> Sampler:
        """What draws images as a section of the configuration says."""
        values = settings.steps, settings.guidance_scale, settings.seed
        sampler = Sampler(pipeline or self.pipeline, *values, precision=self.precision)
        check_trained(self, sampler)
        return sampler


def load_teacher(config: Config, run: Run) -> Teacher:
    """The configuration's model as a teacher. Raises ValueError as `teacher_of` does, and for what cannot be loaded."""
    return teacher_of(component(config, "model"), config, run)


def teacher_of(pipeline: DiffusionPipeline, config: Config, run: Run) -> Teacher:
    """Raises ValueError for what is no pipeline, or has no noise schedule to train on."""
    if not isinstance(pipeline, DiffusionPipeline):
        raise ValueError(f"{config.model} is a UNet alone; it serves +experiment=latency_table only")
    schedule_for(pipeline)  # ValueError for one without betas that is neither flow matching's nor EDM's
    if not config.plan:
        check_weights(pipeline, config)
    if has_weights(pipeline):
        to_device(pipeline, run.accelerator.device)
    config = deepcopy(config)
    if config.data.resolution is None:
        config.data.resolution = native_pixels(pipeline)
    settle_frames(pipeline, config.data)
    check_size(pipeline, *sides(config.data.resolution))
    set_resolution(pipeline, config.data.resolution, config.data.get("frames"))
    return Teacher(frozen(pipeline), config, run)


def settle_frames(pipeline: DiffusionPipeline, data: DictConfig) -> None:
    """Gives data of videos that leave it open as many frames as the pipeline draws. ValueError where that is images."""
    if begins_with_frame(pipeline):
        check_first_frames(data)
    if "frames" not in data:
        return
    if (own := native_frames(pipeline)) is None:
        raise ValueError(f"the data are videos, and a {type(pipeline).__name__} draws images: choose data of images")
    data.frames = data.frames or own


def check_first_frames(data: DictConfig) -> None:
    """ValueError for data of which no video can be made by its first frame."""
    if "frames" not in data:
        way = "data=videofolder data.root=DIR or data=webdataset_video data.source=GLOB"
        raise ValueError(f"a model that makes a video of its first frame needs data of videos, not of images: {way}")
    if data.prompt_file:
        way = "data.first_frames=FOLDER has images to begin with"
        raise ValueError(f"data.prompt_file={data.prompt_file} is for models that read captions alone: {way}")


def check_trained(teacher: Teacher, sampler: Sampler) -> None:
    """ValueError where a teacher that was distilled to a few steps is to be sampled at timesteps it never learnt."""
    if not (steps := trained_steps_of(teacher.pipeline)):
        return
    schedule = schedule_for(teacher.pipeline)
    if not are_among(sampler.starts, schedule.trained_N, schedule):
        raise ValueError(
            f"{sampler.steps} steps are not among the timesteps that {teacher.config.model.name_or_path} was distilled "
            f"to, model.trained_steps={steps}: set eval.steps, scoring.steps and latents.steps to {steps} and their "
            "guidance_scale to 0 or 1, as +experiment=prune_few_step does"
        )


def has_weights(pipeline: DiffusionPipeline | Prunable) -> bool:
    """Whether it is more than its configurations (models/described.py)."""
    network = network_of(pipeline) if isinstance(pipeline, DiffusionPipeline) else pipeline
    return network.device.type != "meta"


def check_weights(pipeline: DiffusionPipeline | Prunable, config: Config) -> None:
    """ValueError for a model that is its configurations alone."""
    if not has_weights(pipeline):
        raise no_weights(config.model.name_or_path)


def frozen(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline for evaluations alone, with a VAE that does not overflow."""
    upcast_vae(pipeline)
    for network in networks(pipeline):
        network.requires_grad_(False).eval()
    return pipeline


# ---- prompts ----


def read_prompt_set(config: Config) -> PromptSet:
    """The prompts of the file that the configuration names, else the data's held-out captions."""
    file, column = (OmegaConf.select(config, f"data.{key}") for key in ("prompt_file", "prompt_column"))
    if not file and column:
        raise ValueError(f"data.prompt_column={column} is of data.prompt_file, and none is given")
    return read_prompts(str(file), column) if file else component(config, "data.prompts")


def numbered_images(count: int) -> PromptSet:
    """What stands in the place of prompts where there are none: image i has noise i."""
    return PromptSet(tuple(f"image {i}" for i in range(count)), "numbers")


def load_first_frames(config: Config, count: int, reads: bool) -> tuple[PromptSet, dict[str, Tensor]]:
    """The names of at most so many first frames, and {name: uint8 [H, W, 3]}: the images of data.first_frames, or the
    first frames of held-out videos, which are called by their captions. reads: whether the model does read captions,
    so that images have to have some."""
    check_first_frames(config.data)
    if (folder := config.data.first_frames) and reads:
        frames = captioned_frames_in_folder(folder, config.data.resolution, count)
        return PromptSet(tuple(frames), str(folder)), frames
    if folder:
        log.info(f"the images of data.first_frames={folder} have no captions: no CLIP score says how videos fit them")
        frames = frames_in_folder(folder, config.data.resolution, count)
        return PromptSet(tuple(frames), str(folder)), frames
    frames = frames_of_videos(heldout_pairs(config, enough=count), count)
    if not frames:
        way = "a higher data.heldout_fraction, or data.first_frames=FOLDER"
        raise ValueError(f"prompts are first frames of held-out videos, and none can be read: {way}")
    return PromptSet(tuple(frames), "first frames"), frames


def load_prompts(teacher: Teacher) -> tuple[PromptSet, PromptSet]:
    """The calibration prompts, which blocks are ranked on, and others, the eval prompts; of an unconditional model
    numbers, each with its noise. First frames in the place of prompts are remembered by the pipeline."""
    config, counts = teacher.config, (teacher.config.scoring.prompts, teacher.config.eval.prompts)
    if teacher.begins_with_frame and not config.plan:
        prompts, frames = load_first_frames(config, sum(counts), teacher.is_conditional)
        with_first_frames(teacher.pipeline, frames)
    else:
        prompts = read_prompt_set(config) if teacher.is_conditional else numbered_images(sum(counts))
    if cut := sum(is_truncated(teacher.pipeline, prompt) for prompt in prompts.prompts):
        log.warning(f"{cut} of {len(prompts)} prompts are longer than the text encoder takes, and are cut")
    return disjoint_prompts(prompts, *counts, way=MORE_FRAMES if teacher.begins_with_frame else MORE_PROMPTS)


def note_trained_on(run: Run, prompts: PromptSet, captions: Iterable[str]) -> None:
    """trained_on.json: the eval prompts that are captions of the training, logged before the first training."""
    new = not run.made(TRAINED_ON)
    seen = run.json(TRAINED_ON, lambda: {"prompts": among(prompts, captions)})["prompts"]
    if new and seen:
        count = f"{len(seen)} of {len(prompts.distinct)} prompts of the evaluation are trained on as captions, too"
        log.warning(f"{count} ({few(seen)}): the scores say less of new ones; data.prompt_file=FILE gives others")
    elif new:
        log.info(f"none of the {len(prompts.distinct)} prompts of the evaluation is trained on as a caption")


def seen_prompts(run: Run) -> dict[str, int]:
    """What an evaluation says of its prompts; nothing where the trainings were finished before it was counted."""
    return {"prompts_in_training": len(run.load(TRAINED_ON)["prompts"])} if run.made(TRAINED_ON) else {}


# ---- scorer and metrics ----


def load_scorer(config: Config, device: torch.device) -> ClipScorer | None:
    """None where the configuration has none, as unconditional models need none; ValueError where diversity does."""
    if (count := config.evaluation.diversity_prompts) and not config.scorer:
        raise ValueError(f"evaluation.diversity_prompts={count} compares features of a scorer, and scorer=none")
    return component(config, "scorer", device=device) if config.scorer else None


def load_metrics(
    config: Config, scorer: ClipScorer | None, device: torch.device, is_conditional: bool = True,
    has_captions: bool = False,
) -> dict[str, Metric]:  # fmt: skip
    """{name: metric}: clip, and those that `metrics` of the configuration describes.

    An unconditional model has no prompts that images could fit: in the place of clip are the error to the reference's
    images and the distance to real ones. Where its first frames have captions, clip stands beside these. ValueError
    where there is no scorer, and prompts.
    """
    if is_conditional and scorer is None:
        raise ValueError(WITHOUT_SCORER)
    requested = {"metrics": config.metrics, "evaluation.preferences": config.evaluation.preferences}
    for key, names in requested.items():
        if names is not None and not OmegaConf.is_dict(names):
            raise ValueError(f"{key}={names} must be a table, as +metric=NAME gives it")
    if requested["evaluation.preferences"]:
        log.warning("evaluation.preferences is now metrics: +metric=NAME instead of +preference=NAME")
    offered = {"device": device, "scorer": scorer}
    made = {str(name): as_metric(component(config, f"{key}.{name}", offered))
            for key, names in requested.items() for name in names or {}}  # fmt: skip
    if is_conditional:
        return {"clip": as_metric(scorer), **made}
    clip = {"clip": as_metric(scorer)} if scorer and has_captions else {}
    distances = {"image_error": ImageError(), "fd": FeatureDistance(scorer) if scorer else PixelDistance()}
    return {**distances, **clip, **made}


def of_what_is_drawn(metrics: Mapping[str, Metric], draws_videos: bool, scorer: ClipScorer | None) -> dict[str, Metric]:
    """The metrics; where videos are drawn, those of images as the mean over frames, and those of videos alone."""
    if not draws_videos:
        return dict(metrics)
    return on_videos(metrics) | video_metrics(scorer, metrics.get("clip"))


def real_distance(config: Config, scorer: ClipScorer | None) -> dict[str, Metric]:
    """The distance to real images as a metric, where the configuration wants it. ValueError where there are none."""
    if not config.evaluation.distribution:
        return {}
    check_real_images(config)
    return {"fd": FeatureDistance(scorer) if scorer else PixelDistance()}


def check_real_images(config: Config) -> None:
    """ValueError where a distance to them is wanted, and there are none."""
    if config.evaluation.distribution and len(heldout_pairs(config, enough=2)) < 2:
        raise ValueError("fewer than 2 held-out images are too few for FID: evaluation.distribution=false")


# ---- data ----


def storage(config: Config) -> CacheConfig:
    """Where and how latents and text states are cached."""
    return CacheConfig(**config.data.cache)


def training_data(teacher: Teacher) -> CachedPairs:
    """Latents and text states of the training images, encoded once."""
    pairs, options = component(teacher.config, "data.pairs"), vars(storage(teacher.config))
    return cache_pairs(pairs, teacher.pipeline, **options, accelerator=teacher.run.accelerator)


def training_pairs(teacher: Teacher, prompts: PromptSet) -> Callable[[], CachedPairs]:
    """`training_data`, made when it is first asked for, and with it the note which of the prompts are trained on."""

    @cache
    def pairs() -> CachedPairs:
        data = training_data(teacher)
        note_trained_on(teacher.run, prompts, data.distinct_captions())
        return data

    return pairs


def heldout_pairs(config: Config, enough: int | None = None) -> Dataset:
    """Images that nothing is trained on."""
    held = component(OmegaConf.merge(config, {"data": {"pairs": {"split": "heldout"}}}), "data.pairs")
    return at_random_access(held, enough) if enough else held


def real_images(config: Config) -> Tensor:
    """Held-out images that can be read, uint8 [R, 3, H, W], or videos [R, F, H, W, 3], in a fixed shuffled order."""
    count = config.evaluation.real_images
    pairs = heldout_pairs(config, count)
    return torch.stack([shown(pair) for pair in islice(readable(pairs, "real images"), count)])


def check_inputs(teacher: Teacher) -> None:
    """ValueError, before anything is made, for a precision, steps or data that cannot be had."""
    check_minimum("eval", teacher.config.eval, 1, "pictures")  # the job's report shows some
    teacher.sampler(teacher.config.eval)
    check_data(teacher)


def check_data(teacher: Teacher) -> None:
    """ValueError for data that cannot be had, or cached."""
    component(teacher.config, "data.pairs")
    folder = Path(storage(teacher.config).folder)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"data.cache.folder={folder} cannot be made: nothing can be written into {existing}")


def offloadable(pipeline: DiffusionPipeline, scorer: ClipScorer | None) -> list[nn.Module]:
    """The networks of a job that a training may not need."""
    return [*networks(pipeline), *([scorer.model] if scorer else [])]
