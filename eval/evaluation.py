"""Evaluating finished pipelines side by side: CLIP scores prompt by prompt, distances, FID and KID, at every setting.

Image i of a model is a function of (seed, prompt i, setting) alone, whatever batch or process draws it. One model is in
memory at a time; a setting that is judged is not judged again, and a killed one goes on at the batch where it stopped.

Axes: P prompts, R real images, D features, H and W height and width in pixels.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from slimstep.data.encoding import check_size, described
from slimstep.data.images import BrokenImageError
from slimstep.data.prompts import PromptSet
from slimstep.data.streams import at_random_access
from slimstep.engine.components import check, component
from slimstep.engine.environment import environment
from slimstep.engine.files import damaged, write_tensors
from slimstep.engine.names import check_name, disk_name
from slimstep.engine.parallel import map_batches
from slimstep.engine.run import Run
from slimstep.engine.seeding import generator
from slimstep.eval.bench import Bench
from slimstep.eval.config import Config
from slimstep.eval.judge import clip_scores, draw_images, write_pictures
from slimstep.eval.metrics.clip import psnr
from slimstep.eval.metrics.compare import mean_and_error, paired_difference
from slimstep.eval.metrics.distribution import frechet_distance, kernel_distance
from slimstep.eval.metrics.inception import Inception
from slimstep.eval.overlap import among, known_captions
from slimstep.eval.sampling import Sampler
from slimstep.eval.scorer_check import compare_teacher
from slimstep.eval.timing.first_image import compile_first
from slimstep.eval.timing.setups import Setup, compile_networks
from slimstep.models.cost import count_parameters
from slimstep.models.pipeline import check_pipeline, load_pipeline, networks, stored_scheduler, upcast_vae
from slimstep.models.schedulers import check_sampling
from slimstep.models.sizes import native_pixels, set_resolution

log = logging.getLogger("slimstep")
LONGEST_NAME = 200  # bytes of a model's: steps and guidance scale follow it in names of files
FEATURES = "real-features.safetensors"
ITS_OWN = ("variant", "scheduler", "loras", "vae")  # keys of `model` that are of this one model
CHECKED = ("variant", "allow_pickle", "single_file_config", "scheduler", "loras")


@dataclass(frozen=True)
class GivenModel:
    """A model as `models` names it: a path alone, or {path: …, steps: […]}, its own numbers of sampling steps."""

    path: str
    steps: tuple[int, ...] = ()

    @classmethod
    def of(cls, name: str, value: Any) -> "GivenModel":
        check_name(name, "models", LONGEST_NAME)
        if not isinstance(value, Mapping):
            return cls(str(value))
        steps = value.get("steps", [])
        if set(value) - {"path", "steps"} or not value.get("path") or not isinstance(steps, list):
            raise ValueError(f"models.{name}={value} must be a path, or {{path: FOLDER, steps: [32, 8]}}")
        if not all(isinstance(n, int) and n >= 1 for n in steps):
            raise ValueError(f"models.{name}.steps={steps} must be numbers from 1 up")
        return cls(str(value["path"]), tuple(steps))


class EvaluationBench(Bench):
    """The models by name, the settings they are sampled at, and what is measured there."""

    def __init__(self, config: Config, run: Run):
        super().__init__(config, run)
        self.asked_resolution: int | None = config.data.resolution  # None is every model's own

    @cached_property
    def given(self) -> dict[str, GivenModel]:
        """The models by name, the reference first; null leaves one out. A missing name is told from the path."""
        given = self.config.model.get("name_or_path") if self.config.models is None else self.config.models
        given = OmegaConf.to_container(given) if OmegaConf.is_config(given) else [given] if given else []
        if not isinstance(given, Mapping):
            given = name_models([str(where) for where in given])
        return {str(name): GivenModel.of(str(name), value) for name, value in given.items() if value is not None}

    @property
    def models(self) -> dict[str, str]:
        """{name: folder or hub id}."""
        return {name: model.path for name, model in self.given.items()}

    @property
    def reference(self) -> str:
        return next(iter(self.models))

    def steps_of(self, name: str) -> list[int]:
        """The numbers of sampling steps that a model is judged at, most first: its own, or those of `curves`."""
        return sorted(set(self.given[name].steps or self.config.curves.steps), reverse=True)

    def settings_of(self, name: str) -> list[tuple[float, int]]:
        """(guidance scale, sampling steps); distances are to the reference's first."""
        return [(g, n) for g in self.config.curves.guidance for n in self.steps_of(name)]

    @property
    def most_steps(self) -> int:
        """What the reference is sampled with where others are compared with it."""
        return self.steps_of(self.reference)[0]

    def check(self) -> None:
        """ValueError, before anything is drawn, for models, prompts, data or a scorer that cannot be had."""
        if not self.models:
            raise ValueError("models names nothing to evaluate: models=[FOLDER,…] or models={teacher: FOLDER, …}")
        self.check_models()
        self.check_steps()
        self.settle_resolution()
        _ = self.precision, self.prompt_set, self.scorer, self.inception, self.preferences
        if self.config.evaluation.distribution and not self.run.made(FEATURES) and len(self.real_pairs) < 2:
            raise ValueError(
                f"{len(self.real_pairs)} held-out images are too few for FID: evaluation.distribution=false"
            )

    def check_models(self) -> None:
        """ValueError for a model that is no pipeline, and for what `model` says beside its name and of none of them."""
        check(self.config.model, "model")
        model = OmegaConf.to_container(self.config.model, resolve=True)
        if "name_or_path" not in model:
            raise ValueError(f"model={model} is a UNet alone; give models=… or model=… that are pipelines")
        astray = [key for key in ITS_OWN if model.get(key)]
        if astray and (named := model["name_or_path"]) not in self.models.values():
            told = f"model.{astray[0]}={model[astray[0]]} is of model.name_or_path={named}"
            raise ValueError(f"{told}, which is not among models={self.models}: name it there")
        for where in set(self.models.values()):
            options = self.options_of(where)
            check_pipeline(where, **{key: value for key, value in options.items() if key in CHECKED})

    def check_steps(self) -> None:
        """ValueError for numbers of steps that a model's scheduler cannot make."""
        for name, where in self.models.items():
            scheduler = stored_scheduler(where, self.options_of(where).get("scheduler"))
            for steps in self.steps_of(name) if scheduler else ():
                try:
                    check_sampling(scheduler, steps)
                except ValueError as error:
                    raise ValueError(f"{where} cannot be sampled at {steps} steps: {error}") from error

    def settle_resolution(self) -> None:
        """The first model's own, where the data leave it open."""
        if self.config.data.resolution is None:
            first = self.loaded(self.models[self.reference])
            self.config.data.resolution = native_pixels(first)

    def options_of(self, where: str) -> dict[str, Any]:
        """How a model is loaded: as `model` says, where it is that one; other models share but the way of reading.

        So nothing is fused into a student that its teacher is fused with.
        """
        model = OmegaConf.to_container(self.config.model, resolve=True)
        others = () if where == model["name_or_path"] else ITS_OWN
        return {key: value for key, value in model.items() if key not in ("_target_", "name_or_path", *others)}

    def loaded(self, where: str) -> DiffusionPipeline:
        """A pipeline as it was handed over, its own scheduler included, at the resolution that is asked for."""
        pipeline = load_pipeline(where, **self.options_of(where))
        pixels = self.asked_resolution or native_pixels(pipeline)
        if self.asked_resolution:
            check_size(pipeline, pixels, pixels)
            set_resolution(pipeline, pixels)
        upcast_vae(pipeline)
        for network in networks(pipeline):
            network.requires_grad_(False).eval()
        return pipeline

    @cached_property
    def prompt_set(self) -> PromptSet:
        prompts, count = self.given_prompts(), self.config.eval.prompts
        if ranked_on := self.config.evaluation.ranked_on:
            return prompts.without(self.ranking_prompts(Path(ranked_on)), count)
        fewer = f"eval.prompts={len(prompts)} or fewer, or " if len(prompts) > 1 else ""
        return prompts.take(count, way=f"{fewer}data.prompt_file=FILE with more")

    def ranking_prompts(self, file: Path) -> frozenset[str]:
        """What prune_unet's prompts.json says that blocks were ranked on."""
        if not file.is_file():
            raise FileNotFoundError(f"evaluation.ranked_on={file} does not exist; give prune_unet's prompts.json")
        with damaged(file):
            return frozenset(json.loads(file.read_text())["ranked_on"])

    @property
    def has_images(self) -> bool:
        """Whether the data's images are needed; where prompts come from a file they may not be there."""
        return not self.config.data.prompt_file or self.config.evaluation.distribution

    def seen_prompts(self) -> dict[str, int]:
        """How many prompts the training images of the data have as captions; nothing where that is not known."""
        if not self.has_images:
            return {}
        try:
            captions = known_captions(self.component("data.pairs"), self.cache_folder)
        except ValueError:
            return {}  # all images are held out, or the data have no other split
        return {} if captions is None else {"prompts_in_training_split": len(among(self.prompt_set, captions))}

    def sampler_of(self, pipeline: DiffusionPipeline, guidance: float, steps: int) -> Sampler:
        return Sampler(pipeline, steps, guidance, self.config.eval.seed, precision=self.precision)

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        """The reference on the device: what a plan measures."""
        return self.loaded(self.models[self.reference]).to(self.device)

    @property
    def model(self) -> DiffusionPipeline:
        return self.pipeline

    # ---- one model ----

    def judge(self, name: str) -> list[dict]:
        """All settings of one model: `judged/<name>/….json`."""
        settings = self.settings_of(name)
        files = {(g, n): f"judged/{name}/guidance-{g}-steps-{n}.json" for g, n in settings}
        if not all(self.run.made(file) for file in files.values()):
            pipeline = self.loaded(self.models[name]).to(self.device)
            if self.config.evaluation.compile:
                self.compile(name, pipeline)
            for setting, file in files.items():
                self.run.json(file, lambda s=setting: self.point(name, pipeline, *s))
        return [self.run.load(file) for file in files.values()]

    def compile(self, name: str, pipeline: DiffusionPipeline) -> None:
        """Compiles UNet and VAE decoder by drawing a batch, with the graphs that an earlier process has left."""
        prompts, size = self.prompt_set, min(self.config.eval.batch_size, len(self.prompt_set))
        guided = [guidance > 1 for guidance in self.config.curves.guidance]
        networks_text = [described(pipeline.unet), described(pipeline.vae)]
        key = [*networks_text, size, guided, torch.__version__, self.device.type]
        key += [] if self.precision == "float32" else [self.precision]
        file = Path(self.config.evaluation.artifacts) / f"{hashlib.sha256(str(key).encode()).hexdigest()[:16]}.bin"
        compile_networks(pipeline, Setup(compile="default"))
        kept, start = self.run.agreed(file.exists()), time.perf_counter()

        def draw() -> None:
            guidance, steps = self.settings_of(name)[0]
            self.sampler_of(pipeline, guidance, steps).images(pipeline.unet, prompts.prompts, range(size))

        compile_first(file, draw, self.run.accelerator)
        way = f"with {file}" if kept else f"which left {file}"
        log.info(f"{name}: first batch of compiled networks in {time.perf_counter() - start:.0f} s, {way}")

    def point(self, name: str, pipeline: DiffusionPipeline, guidance: float, steps: int) -> dict:
        config, accelerator, scorer, prompts = self.config.eval, self.run.accelerator, self.scorer, self.prompt_set
        sampler = self.sampler_of(pipeline, guidance, steps)
        what = f"{name}, guidance {guidance:g}, {steps} steps"
        keep = self.partial(f"{name}-{guidance}-{steps}")
        images = draw_images(what, pipeline.unet, sampler, prompts, config.batch_size, accelerator, keep)
        if name == self.reference and steps == self.most_steps:
            self.keep_reference(guidance, images)
        text = scorer.text(prompts.prompts)
        clip = self.by_text(clip_scores(images, text, scorer, config.batch_size, accelerator))
        features = {kind: self.features(images, kind) for kind in self.extractors}
        if config.pictures:
            place = f"images/{name}/steps-{steps}-guidance-{guidance}"
            self.run.folder(place, lambda folder: write_pictures(images[: config.pictures], folder))
        return {
            "model": name,
            "steps": steps,
            "guidance": guidance,
            "protocol": sampler.protocol,
            "parameters": {"UNet": count_parameters(pipeline.unet), "decoder": count_parameters(pipeline.vae.decoder)},
            "evaluations": sampler.evaluations(pipeline.unet),
            "clip": clip,
            "preferences": {key: self.by_text(self.preferred(key, images)) for key in self.preferences},
            "to_reference": self.distances(images, features["scorer"], guidance),
            "distribution": self.distribution(features),
            **self.as_teacher(name, steps, features["scorer"]),
        }

    def as_teacher(self, name: str, steps: int, image_ND: Tensor) -> dict:
        """Whether the reference is above chance; nothing of other models."""
        is_teacher = name == self.reference and steps == self.most_steps
        return {"against_shuffled": compare_teacher(image_ND, self.prompt_set, self.scorer)} if is_teacher else {}

    @cached_property
    def inception(self) -> Inception | None:
        file = self.config.evaluation.inception
        return Inception(file, self.device) if file else None

    @cached_property
    def extractors(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What makes features of uint8 images: the scorer unit ones, Inception, where it is given, those of FID."""
        of_scorer = {"scorer": lambda images: self.scorer.image(images).float()}
        return of_scorer | ({"inception": self.inception} if self.inception else {})

    def by_text(self, scores: Tensor) -> dict:
        """Scores of images as what is kept of them: a value per distinct prompt, their mean and its error."""
        values = self.prompt_set.by_text(scores).tolist()
        mean = mean_and_error(values)
        return {"mean": mean.mean, "se": mean.se, "per_prompt": values}

    @cached_property
    def preferences(self) -> dict[str, Callable[[Tensor, list[str]], Tensor]]:
        """{name: (images, prompts) -> scores}: what was trained on human preferences."""
        names = self.config.evaluation.preferences or {}
        return {str(name): self.component(f"evaluation.preferences.{name}", device=self.device) for name in names}

    def preferred(self, name: str, images: Tensor) -> Tensor:
        """The score [P] of every image for its own prompt."""
        texts = self.prompt_set.prompts
        rate = lambda indices: self.preferences[name](images[indices], [texts[i] for i in indices])  # noqa: E731
        return map_batches(rate, len(images), self.config.eval.batch_size, self.run.accelerator, name)

    def features(self, images: Tensor, kind: str) -> Tensor:
        """Features [P, D] of uint8 images."""
        rate = lambda indices: self.extractors[kind](images[indices])  # noqa: E731
        return map_batches(rate, len(images), self.config.eval.batch_size, self.run.accelerator, f"{kind} features")

    # ---- beside the reference, and beside real images ----

    def keep_reference(self, guidance: float, images: Tensor) -> None:
        file = f"reference/guidance-{guidance}.safetensors"
        if not self.run.made(file) and self.run.accelerator.is_main_process:
            write_tensors(self.run.path / file, {"images": images})
        self.run.accelerator.wait_for_everyone()

    def distances(self, images: Tensor, features: Tensor, guidance: float) -> dict | None:
        """PSNR in dB and cosine of features to the reference's images from the same noise; None where sizes differ."""
        path = self.run.path / f"reference/guidance-{guidance}.safetensors"
        with damaged(path):
            wanted = load_file(path)["images"]
        if wanted.shape != images.shape:
            return None
        cosine = (features * self.features(wanted, "scorer")).sum(1)
        near = {"psnr": psnr(images, wanted), "features": cosine}
        means = {key: mean_and_error(self.prompt_set.by_text(values).tolist()) for key, values in near.items()}
        return {key: {"mean": m.mean, "se": m.se} for key, m in means.items()}

    @cached_property
    def real_pairs(self):
        """Held-out images: what distributions are compared with."""
        held = component(OmegaConf.merge(self.config, {"data": {"pairs": {"split": "heldout"}}}), "data.pairs")
        return at_random_access(held, self.config.evaluation.real_images)

    @cached_property
    def real_features(self) -> dict[str, Tensor]:
        """[R, D] of each kind, of the same held-out images in a fixed shuffled order."""
        file = self.run.path / FEATURES
        if not self.run.made(FEATURES):
            order = torch.randperm(len(self.real_pairs), generator=generator("real images")).tolist()
            images = torch.stack(list(readable(self.real_pairs, order, self.config.evaluation.real_images)))
            features = {kind: self.features(images, kind) for kind in self.extractors}
            if self.run.accelerator.is_main_process:
                write_tensors(file, features)
            self.run.accelerator.wait_for_everyone()
        with damaged(file):
            return load_file(file)

    def distribution(self, features: dict[str, Tensor]) -> dict | None:
        """Fréchet and kernel distance to real images: fd and kd of the scorer's features, fid and kid of Inception's.

        None where not asked for.
        """
        if not self.config.evaluation.distribution:
            return None
        made, real = features["scorer"], self.real_features["scorer"]
        kd = kernel_distance(made, real)
        distances = {"fd": frechet_distance(made, real), "kd": kd.mean, "kd_se": kd.se, "n": len(made),
                     "n_real": len(real), "features": f"{self.scorer.protocol['model']}, unit features"}  # fmt: skip
        if self.inception:
            made, real = features["inception"], self.real_features["inception"]
            kid = kernel_distance(made, real, divisor=made.shape[1])
            distances |= {"fid": frechet_distance(made, real), "kid": kid.mean, "kid_se": kid.se}
        return distances

    # ---- all together ----

    def evaluate(self) -> dict:
        """Every model at every setting, paired with the reference at its most steps: results.json."""
        points = [point for name in self.models for point in self.judge(name)]
        most = self.most_steps
        base = {p["guidance"]: p for p in points if p["model"] == self.reference and p["steps"] == most}

        def compared(point: dict) -> dict:
            other = base[point["guidance"]]

            def versus(own: dict, others: dict) -> dict | None:
                return None if point is other else asdict(paired_difference(own["per_prompt"], others["per_prompt"]))

            preferences = {
                name: {**own, "versus_reference": versus(own, other["preferences"][name])}
                for name, own in point["preferences"].items()
            }
            return {**point, "versus_reference": versus(point["clip"], other["clip"]), "preferences": preferences}

        prompts = self.prompt_set
        return self.run.json("results.json", lambda: {
            "models": self.models,
            "reference": {"model": self.reference, "steps": most},
            "prompts": prompts.name,
            "prompts_hash": prompts.hash,
            "shown": list(prompts.prompts[: self.config.eval.pictures]),
            "n": len(prompts.distinct),
            **self.seen_prompts(),
            "protocol": {**self.scorer.protocol, "seed": self.config.eval.seed,
                         "inception": self.inception and self.inception.weights,
                         "preferences": OmegaConf.to_container(self.config.evaluation)["preferences"]},
            "points": [compared(point) for point in points],
            "environment": environment(),
        })  # fmt: skip


def readable(pairs, order: list[int], count: int) -> Iterator[Tensor]:
    """Up to `count` images that can be read, in this order."""
    found = 0
    for index in order:
        try:
            image = pairs[index]["image"]
        except BrokenImageError as error:
            log.warning(f"left out: {error}")
            continue
        yield image
        found += 1
        if found == count:
            return


def name_models(paths: list[str]) -> dict[str, str]:
    """{name: path} with the shortest names that tell the paths apart; an export is called as its run."""
    if len(set(map(Path, paths))) < len(paths):
        raise ValueError(f"models={paths} names one of them twice")
    parts = {path: [p for p in Path(path).parts if p not in ("export", "/")] or [path] for path in paths}
    for length in range(1, 1 + max(map(len, parts.values()), default=0)):
        names = {disk_name("-".join(own[-length:]), LONGEST_NAME): path for path, own in parts.items()}
        if len(names) == len(parts):
            return names
    return {disk_name(path.replace("..", "_"), LONGEST_NAME): path for path in paths}
