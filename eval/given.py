"""Finished pipelines as `models` of the configuration names them: their names, numbers of steps, and how they load."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from omegaconf import DictConfig, OmegaConf

from slimstep.data.encoding import check_size
from slimstep.engine.components import check
from slimstep.engine.names import check_name, disk_name
from slimstep.engine.resolution import Resolution, sides
from slimstep.eval.config import Config
from slimstep.eval.inputs import frozen, settle_frames
from slimstep.models.described import is_described, no_weights
from slimstep.models.families.deepfloyd.cascade import check_cascade
from slimstep.models.family import draws_from_frames, family_at, stored_flow
from slimstep.models.flow import is_flow
from slimstep.models.pipeline import check_pipeline, load_pipeline, stored_scheduler
from slimstep.models.schedulers import check_sampling
from slimstep.models.sizes import native_pixels, set_frames, set_resolution

LONGEST_NAME = 200  # bytes of a model's: steps and guidance scale follow it in names of files
ITS_OWN = ("variant", "scheduler", "timestep_spacing", "loras", "vae")  # keys of `model` that are of this one model
OWN = (*ITS_OWN, "first_stage")  # what each of `models` may have of its own; model.first_stage is the others', too
CHECKED = ("variant", "allow_pickle", "single_file_config", "scheduler", "timestep_spacing", "loras")


@dataclass(frozen=True)
class GivenModel:
    """A model as `models` names it: a path alone, or {path: …} with its own numbers of sampling `steps`, its own
    `guidance`, a scale, and `options`, how it alone is loaded, as a LoRA of few steps with its scheduler."""

    path: str
    steps: tuple[int, ...] = ()
    guidance: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, value: Any) -> "GivenModel":
        check_name(name, "models", LONGEST_NAME)
        if not isinstance(value, Mapping):
            return cls(str(value))
        steps, guidance = value.get("steps", []), value.get("guidance")
        options = {key: option for key, option in value.items() if key in OWN}
        if set(value) - {"path", "steps", "guidance", *OWN} or not value.get("path") or not isinstance(steps, list):
            more = f"; it may also have {', '.join(OWN)}, as model has them"
            way = f"must be a path, or {{path: FOLDER, steps: [4], guidance: 0}}{more}"
            raise ValueError(f"models.{name}={value} {way}")
        if not all(isinstance(n, int) and n >= 1 for n in steps):
            raise ValueError(f"models.{name}.steps={steps} must be numbers from 1 up")
        if guidance is not None and not (isinstance(guidance, (int, float)) and 0 <= guidance < math.inf):
            raise ValueError(f"models.{name}.guidance={guidance} must be a number from 0 up")
        return cls(str(value["path"]), tuple(steps), guidance if guidance is None else float(guidance), options)


@dataclass(frozen=True)
class GivenModels:
    """The models by name, the reference first; those without steps of their own are sampled at `default_steps`.

    `model` is that section of the configuration; `pixels` the resolution that is asked for, and `frames` those of
    videos, None for every model's own.
    """

    models: Mapping[str, GivenModel]
    default_steps: tuple[int, ...]
    model: Mapping[str, Any]
    pixels: Resolution | None
    frames: int | None = None

    @property
    def paths(self) -> dict[str, str]:
        """{name: folder or hub id}."""
        return {name: model.path for name, model in self.models.items()}

    @property
    def is_conditional(self) -> bool:
        """Whether there are prompts. ValueError where that is so of some of the models alone."""
        kinds = {path: family_at(path).IS_CONDITIONAL for path in self.paths.values()}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"models={self.paths}: some take prompts and some do not, {kinds}; compare them apart")
        return all(kinds.values())

    @property
    def draws_videos(self) -> bool:
        """ValueError where that is so of some of the models alone."""
        kinds = {path: family_at(path).DRAWS_VIDEOS for path in self.paths.values()}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"models={self.paths}: some draw videos and some images, {kinds}; compare them apart")
        return all(kinds.values())

    @property
    def begin_with_frames(self) -> bool:
        """Whether first frames stand in the place of prompts. ValueError where that is so of some of the models."""
        kinds = {path: draws_from_frames(family_at(path)) for path in self.paths.values()}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"models={self.paths}: some make a video of its first frame, {kinds}; compare them apart")
        return all(kinds.values())

    @property
    def reference(self) -> tuple[str, int]:
        """The first model, and its most steps: what others are compared with."""
        name = next(iter(self.models))
        return name, self.steps(name)[0]

    def steps(self, name: str) -> list[int]:
        """The numbers of sampling steps of a model, most first."""
        return sorted(set(self.models[name].steps or self.default_steps), reverse=True)

    def guidance(self, name: str, compared_at: float) -> float:
        """The scale that a model is sampled with, where the reference is with `compared_at`."""
        own = self.models[name].guidance
        return compared_at if own is None else own

    def compared_at(self, name: str, scales: Sequence[float]) -> list[float]:
        """The guidance scales of the reference at which a model is compared with it: the first alone, where it has a
        scale of its own."""
        return list(scales) if self.models[name].guidance is None else [scales[0]]

    def options(self, path: str) -> dict[str, Any]:
        """How a model is loaded: as `model` says, where it is that one; other models share but the way of reading.

        So nothing is fused into a student that its teacher is fused with; prompts have the length of each pipeline. Of
        a cascade the first stage is what the one of `models` that lies there says, else what `model` says.
        """
        others = () if path == self.model["name_or_path"] else (*ITS_OWN, "max_sequence_length", "trained_steps")
        options = {key: value for key, value in self.model.items() if key not in ("_target_", "name_or_path", *others)}
        there = [model.options for model in self.models.values() if model.path == path]
        own = there[0] if len(there) == 1 else {}
        return {**options, **({"first_stage": own["first_stage"]} if "first_stage" in own else {})}

    def options_of(self, name: str) -> dict[str, Any]:
        """How the model of this name is loaded: as its path is, but for options of its own."""
        return {**self.options(self.models[name].path), **self.models[name].options}

    def load_named(self, name: str) -> DiffusionPipeline:
        """The pipeline of this name, with its own options."""
        return self.load(self.models[name].path, **self.models[name].options)

    def load(self, path: str, **own: Any) -> DiffusionPipeline:
        """A pipeline as it was exported, its own scheduler included, at the resolution that is asked for."""
        pipeline = load_pipeline(path, **{**self.options(path), **own})
        if self.pixels:
            check_size(pipeline, *sides(self.pixels))
            set_resolution(pipeline, self.pixels)
        if self.frames:
            set_frames(pipeline, self.frames)
        return frozen(pipeline)

    def check(self) -> None:
        """ValueError for a model that is no pipeline or cannot be sampled at its steps, and for what `model` says
        beside its name and of none of them."""
        astray = [key for key in ITS_OWN if self.model.get(key)]
        if astray and (named := self.model["name_or_path"]) not in self.paths.values():
            said = f"model.{astray[0]}={self.model[astray[0]]} is of model.name_or_path={named}"
            raise ValueError(f"{said}, which is not among models={self.paths}: name it there")
        for name, path in self.paths.items():
            options = self.options_of(name)
            check_pipeline(path, **{key: value for key, value in options.items() if key in CHECKED})
            check_cascade(path, options.get("first_stage"))
            scheduler = stored_scheduler(path, options.get("scheduler"), options.get("timestep_spacing"))
            flow = stored_flow(path) if scheduler and is_flow(scheduler) else None
            for steps in self.steps(name) if scheduler else ():
                try:
                    check_sampling(scheduler, steps, flow)
                except ValueError as error:
                    raise ValueError(f"{path} cannot be sampled at {steps} steps: {error}") from error


def given_models(config: Config, default_steps: list[int], purpose: str) -> GivenModels:
    """What `models` names, or `model` where it names nothing; null leaves one out. A missing name is made of the path.

    Raises ValueError where nothing is left, or a name or a number of steps cannot be. `purpose` is what models are for.
    """
    check(config.model, "model")
    model = OmegaConf.to_container(config.model, resolve=True)
    if "name_or_path" not in model:
        raise ValueError(f"model={model} is a UNet alone; give models=… or model=… that are pipelines")
    named = model["name_or_path"] if config.models is None else config.models
    named = OmegaConf.to_container(named) if OmegaConf.is_config(named) else [named] if named else []
    if not isinstance(named, Mapping):
        named = name_models([str(path) for path in named])
    models = {str(name): GivenModel.of(str(name), value) for name, value in named.items() if value is not None}
    if is_described(model) and model["name_or_path"] in (given.path for given in models.values()):
        raise no_weights(model["name_or_path"])
    if not models:
        raise ValueError(f"models names nothing to {purpose}: models=[FOLDER,…] or models={{teacher: FOLDER, …}}")
    reference, first = next(iter(models.items()))
    if first.guidance is not None:
        way = f"set curves.guidance=[{first.guidance:g}], at which models without a scale of their own are sampled, too"
        raise ValueError(f"models.{reference}.guidance={first.guidance:g} is of the first model, the reference: {way}")
    return GivenModels(models, tuple(default_steps), model, config.data.resolution, config.data.get("frames"))


def settle_size(models: GivenModels, data: DictConfig) -> None:
    """Gives data that leave it open the resolution, and of videos the frames, that the first model draws."""
    if models.pixels is None or ("frames" in data and models.frames is None):
        pipeline = models.load_named(models.reference[0])
        data.resolution = models.pixels or native_pixels(pipeline)
        settle_frames(pipeline, data)


def name_models(paths: list[str]) -> dict[str, str]:
    """{name: path} with the shortest names that tell the paths apart; an export is called as its run."""
    if len(set(map(Path, paths))) < len(paths):
        raise ValueError(f"models={paths} names one of them twice")
    parts = {path: [p for p in Path(path).parts if p not in ("export", "/")] or [path] for path in paths}
    for length in range(1, 1 + max(map(len, parts.values()), default=0)):
        names = {disk_name("-".join(folders[-length:]), LONGEST_NAME): path for path, folders in parts.items()}
        if len(names) == len(parts):
            return names
    return {disk_name(path.replace("..", "_"), LONGEST_NAME): path for path in paths}
