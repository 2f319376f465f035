"""What every job works with, made when first asked for: teacher, data, prompts, scorer, objectives."""

import copy
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from slimstep.data.cache import CachedPairs, cache_pairs
from slimstep.data.config import CacheConfig
from slimstep.data.encoding import is_truncated
from slimstep.data.folder import few
from slimstep.data.prompts import PromptSet, disjoint_prompts, read_prompts
from slimstep.engine.checks import check_minimum
from slimstep.engine.components import check, component
from slimstep.engine.config import TrainConfig
from slimstep.engine.loop import load_trained, train, trained
from slimstep.engine.objective import Objective, check_requirements
from slimstep.engine.run import FINISHED, Run
from slimstep.engine.sharding import autocast_dtype
from slimstep.eval.config import Config, LatencyConfig, SamplingConfig
from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.overlap import among
from slimstep.eval.sampling import Sampler
from slimstep.eval.timing.precision import settled
from slimstep.models.card import Origin, origin_of, write_card
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import NUM_TOKENS, denoiser_of
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.noise_schedule import schedule_of
from slimstep.models.pipeline import networks, upcast_vae
from slimstep.models.sizes import native_pixels, set_resolution

log = logging.getLogger("slimstep")
TRAINED_ON = "trained_on.json"


class Bench:
    """Components of one run, from its configuration; a stage that is already made loads nothing."""

    def __init__(self, config: Config, run: Run):
        self.config, self.run, self.device = config, run, run.accelerator.device

    @cached_property
    def pipeline(self):
        """The teacher pipeline, frozen, on the device; its UNet is prunable.

        Raises ValueError for what is no pipeline, or has no noise schedule to train on.
        """
        pipeline = self.model
        if not isinstance(pipeline, DiffusionPipeline):
            raise ValueError(f"{self.config.model} is a UNet alone; it serves +experiment=latency_table only")
        schedule_of(pipeline.scheduler)  # ValueError for one without betas
        pipeline.to(self.device)
        if self.config.data.resolution is None:
            self.config.data.resolution = native_pixels(pipeline)
        set_resolution(pipeline, self.config.data.resolution)
        upcast_vae(pipeline)
        for network in networks(pipeline):
            network.requires_grad_(False).eval()
        return pipeline

    @cached_property
    def model(self):
        """What the configuration calls the model: a pipeline, or a UNet alone."""
        return self.component("model")

    @property
    def unet(self) -> PrunableUNet2DConditionModel:
        """The model's UNet, for what needs no more than that."""
        return getattr(self.model, "unet", self.model)

    @property
    def teacher(self) -> PrunableUNet2DConditionModel:
        return self.pipeline.unet

    @property
    def compute_dtype(self) -> torch.dtype:
        """What mixed precision computes in."""
        return autocast_dtype(self.run.accelerator)

    @property
    def latency(self) -> LatencyConfig:
        config = OmegaConf.to_object(self.config.latency)
        return replace(config, text_length=config.text_length or self.text_length)

    @property
    def text_length(self) -> int:
        """Tokens of a prompt: the model's own, 77 for a UNet alone."""
        return self.model.tokenizer.model_max_length if hasattr(self.model, "tokenizer") else NUM_TOKENS

    def train(self, unet: PrunableUNet2DConditionModel, objective, config: TrainConfig, stage: str, **given):
        """A stage of the loop; where it is finished, neither data nor objective are touched."""
        if trained(self.run, stage):
            return load_trained(unet, self.run, stage)
        objective = self.objective(objective, **given)
        samples = self.samples(objective, stage)
        self.note_trained_on()
        with self.resting():
            return train(unet, objective, samples, config, self.run, stage)

    def working(self, unet: PrunableUNet2DConditionModel) -> PrunableUNet2DConditionModel:
        """A frozen network as mixed precision runs it: on the device, cast once and not at every evaluation."""
        here = torch.empty(0, device=self.device).device  # "cuda" is a place only once it has a number
        if (unet.device, unet.dtype) == (here, self.compute_dtype):
            return unet
        return copy.deepcopy(unet).to(self.device, self.compute_dtype)

    @cached_property
    def working_teacher(self) -> PrunableUNet2DConditionModel:
        """The teacher as objectives ask it; its full weights rest meanwhile, where this is a copy."""
        return self.working(self.teacher)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """What is idle lies on the CPU meanwhile: what trains needs the device more."""
        for network in self.idle:
            network.to("cpu")
        try:
            yield
        finally:
            for network in self.idle:
                network.to(self.device)

    @property
    def idle(self) -> list[nn.Module]:
        """The networks that no training asks: the pipeline's but for the teacher that is at work, and the scorer's."""
        idle = [network for network in networks(self.pipeline) if network is not self.teacher]
        made = vars(self)
        if "scorer" in made:
            idle.append(self.scorer.model)
        copied = made.get("working_teacher", self.teacher) is not self.teacher
        return [*idle, self.teacher] if copied else idle

    def samples(self, objective: Objective, stage: str):
        """The data set that a stage learns from."""
        return self.pairs

    @cached_property
    def pairs(self) -> CachedPairs:
        """Latents and text states of the training images, encoded once."""
        _ = self.pipeline  # says the resolution where the data leave it open
        pairs, accelerator = self.component("data.pairs"), self.run.accelerator
        return cache_pairs(pairs, self.pipeline, **vars(self.storage), accelerator=accelerator)

    def training_captions(self) -> Iterable[str]:
        """The texts that this job trains on."""
        return self.pairs.distinct_captions()

    def note_trained_on(self) -> None:
        """trained_on.json: the prompts of the evaluation that are trained on as captions, told before the first
        training."""
        run, prompts, new = self.run, self.prompts[1], not self.run.made(TRAINED_ON)
        seen = run.json(TRAINED_ON, lambda: {"prompts": among(prompts, self.training_captions())})["prompts"]
        if new and seen:
            told = f"{len(seen)} of {len(prompts.distinct)} prompts of the evaluation are trained on as captions, too"
            log.warning(f"{told} ({few(seen)}): the scores say less of new ones; data.prompt_file=FILE gives others")
        elif new:
            log.info(f"none of the {len(prompts.distinct)} prompts of the evaluation is trained on as a caption")

    @property
    def seen_prompts(self) -> dict[str, int]:
        """What evaluation.json says of its prompts; nothing where the trainings were finished before it was counted."""
        if not self.run.made(TRAINED_ON):
            return {}
        return {"prompts_in_training": len(self.run.load(TRAINED_ON)["prompts"])}

    @property
    def storage(self) -> CacheConfig:
        """Where and how latents and text states are cached."""
        return CacheConfig(**self.config.data.cache)

    @property
    def cache_folder(self) -> Path:
        return Path(self.storage.folder)

    @cached_property
    def prompts(self) -> tuple[PromptSet, PromptSet]:
        """The prompts blocks are ranked on, and others, that the outcome is judged on."""
        _, prompts = self.pipeline, self.given_prompts()
        cut = sum(is_truncated(self.pipeline.tokenizer, prompt) for prompt in prompts.prompts)
        if cut:
            log.warning(f"{cut} of {len(prompts)} prompts are longer than the text encoder takes, and are cut")
        return disjoint_prompts(prompts, self.config.scoring.prompts, self.config.eval.prompts)

    def given_prompts(self) -> PromptSet:
        """The prompts of the file that the configuration names, else the data's held-out captions."""
        file, column = (OmegaConf.select(self.config, f"data.{key}") for key in ("prompt_file", "prompt_column"))
        if not file and column:
            raise ValueError(f"data.prompt_column={column} is of data.prompt_file, and none is given")
        return read_prompts(str(file), column) if file else self.component("data.prompts")

    @property
    def precision(self) -> str:
        """What all images are drawn in. ValueError where the device has no such thing."""
        return settled(self.config.sampling.precision, self.device)

    @cached_property
    def scorer(self) -> ClipScorer:
        return self.component("scorer", device=self.device)

    def component(self, key: str, **given):
        return component(self.config, key, **given)

    def sampler(self, protocol) -> Sampler:
        """What draws images as a section of the configuration says."""
        settings = protocol.steps, protocol.guidance_scale, protocol.seed
        return Sampler(self.pipeline, *settings, precision=self.precision)

    def objective(self, config, **given) -> Objective:
        """An objective of the loop from its `_target_`; each takes denoiser, schedule, unconditional and teacher.

        ValueError where its arguments are not what the class takes.
        """
        given = {"schedule": schedule_of(self.pipeline.scheduler, self.device), **given}
        given = {"denoiser": denoiser_of(self.teacher, given["schedule"].prediction_type), **given}
        if "uncond" not in given:
            given["uncond"] = self.pairs.unconditional.to(self.device)
        if "teacher" not in given:
            given["teacher"] = self.working_teacher
        return self.made_objective(config, **given)

    @staticmethod
    def made_objective(config, **given) -> Objective:
        try:
            return instantiate(config, _partial_=True, _convert_="all")(**given)
        except (TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
            raise ValueError(f"objective {config['_target_']}: {type(error).__name__}: {error}") from error

    def check_objective(self, key: str, config, training: TrainConfig, **given) -> None:
        """ValueError for the objective under `key` if it cannot be, or be trained in this way; no data are touched."""
        check(config, key)
        given = {"teacher": self.teacher, "uncond": Conditioning(), **given}
        check_requirements(self.objective(config, **given), training, self.run.accelerator)

    def check_inputs(self) -> None:
        """ValueError, before anything is made, for a precision, steps, data, prompts or a scorer that cannot be had."""
        check_minimum("eval", self.config.eval, 1, "pictures")  # the job's report shows some
        self.sampler(self.config.eval)
        self.check_data()
        _ = self.prompts, self.scorer

    def check_data(self) -> None:
        """ValueError for data that cannot be had, or cached."""
        _ = self.pipeline  # says the resolution where the data leave it open
        self.component("data.pairs")
        folder = self.cache_folder
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"data.cache.folder={folder} cannot be made: nothing can be written into {there}")

    def origin(self, sampling: SamplingConfig, steps: int | None = None) -> Origin:
        """What an export of this job says of itself: it is sampled as it was evaluated, but for its own `steps`."""
        teacher = str(self.config.model.name_or_path)
        return Origin(teacher, steps or sampling.steps, sampling.guidance_scale)

    def card(self, name: str, results: Sequence[str]) -> None:
        """The model card of the export `name`, with a line for every result; once the report is there it stays."""
        folder = self.run.path / name
        if self.run.accelerator.is_main_process and origin_of(folder) and not (self.run.path / FINISHED).exists():
            write_card(folder, results)

    def partial(self, name: str) -> Path:
        """Where unfinished work lies, batch by batch, so that a killed run goes on within it."""
        return self.run.path / "partial" / name


def clip_line(clip: Mapping[str, Any], against: Mapping[str, Any]) -> str:
    """A score with its standard error, and the difference to the teacher's with its interval."""
    paired = f"{against['mean']:+.2f} [{against['low']:+.2f}, {against['high']:+.2f}]"
    score = f"CLIP score {clip['mean']:.2f} ± {clip['se']:.2f}"
    return f"{score}; minus the teacher's, paired over {against['n']} prompts: {paired}"
