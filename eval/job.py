"""The evaluation job: finished pipelines, ours or not, on the same prompts from the same noise."""

import copy
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from omegaconf import OmegaConf
from torch import Tensor

from slimstep.data.encoding import described
from slimstep.data.prompts import PromptSet
from slimstep.engine.components import component
from slimstep.engine.console import print_for_programs
from slimstep.engine.files import digest
from slimstep.engine.planning import Plan
from slimstep.engine.run import Run
from slimstep.eval.config import Config
from slimstep.eval.evaluator import Candidate, Evaluator, place
from slimstep.eval.given import GivenModels, given_models, settle_size
from slimstep.eval.inputs import (
    MORE_FRAMES,
    Teacher,
    load_first_frames,
    load_metrics,
    load_scorer,
    numbered_images,
    of_what_is_drawn,
    read_prompt_set,
    real_distance,
    storage,
)
from slimstep.eval.memory_plan import drawing_lines
from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.inception import Inception
from slimstep.eval.metrics.metric import FeatureSimilarity, InceptionDistance, Psnr
from slimstep.eval.overlap import among, known_captions, read_calibration_prompts
from slimstep.eval.pages.evaluation_page import models_table, summary, write_evaluation_report
from slimstep.eval.pages.text import overlap_sentence
from slimstep.eval.plan import Stage, image_count, image_rows, scorer_stage, stages_table, time_line
from slimstep.eval.record import Evaluation
from slimstep.eval.reporting import report, track_table
from slimstep.eval.sampling import Sampler
from slimstep.eval.scorer_check import check_scorer
from slimstep.eval.timing.cold_start import compile_first
from slimstep.eval.timing.inference import InferenceConfig, compile_networks
from slimstep.eval.timing.precision import settled
from slimstep.models.cost import count_parameters
from slimstep.models.first_frames import with_first_frames
from slimstep.models.networks import network_of
from slimstep.models.pipeline import to_device

log = logging.getLogger("slimstep")


def evaluate(config: Config, run: Run) -> int | Plan:
    """Runs or continues the job, or tells what it would do; returns exit code 0.

    The last line printed is JSON, where stdout is no terminal.
    """
    models = given_models(config, config.curves.steps, "evaluate")
    models.check()
    config = copy.deepcopy(config)
    settle_size(models, config.data)
    is_conditional, scorer = models.is_conditional, load_scorer(config, run.accelerator.device)
    prompts, frames = evaluated_prompts(models, config)
    evaluator = evaluator_of(models, config, run, prompts, scorer, frames)
    has_images = is_conditional and (not config.data.prompt_file or config.evaluation.distribution)
    if config.plan:
        stages = [*(scorer_stage(run) if has_images else []), *evaluation_stages(models, config)]
        reference = to_device(models.load_named(models.reference[0]), run.accelerator.device)
        line, hours = time_line(Teacher(reference, config, run), stages, [])
        return Plan("\n".join([stages_table(run, stages), line, *drawing_lines(reference)]), hours)
    if is_conditional:
        check_scorer(config, run, scorer, has_images=has_images)
    points = [evaluator.point(*key) for key in settings(models, config)]
    seen = seen_in_training(config, prompts) if has_images else {}
    evaluation = evaluator.evaluate(points, models.paths, protocol(config, scorer), seen)
    report(run, partial(write_page, run, evaluation), lambda: models_table(evaluation.points).console)
    if run.accelerator.is_main_process:
        print_for_programs({"run": str(run.path.resolve()), **summary(evaluation)})
    return 0


def settings(models: GivenModels, config: Config) -> list[tuple[str, int, float]]:
    """Model, sampling steps and guidance scale of every point; the scale is that of the reference beside it."""
    scales = {name: models.compared_at(name, config.curves.guidance) for name in models.models}
    return [(name, steps, guidance) for name in scales for guidance in scales[name] for steps in models.steps(name)]


def evaluation_stages(models: GivenModels, config: Config) -> Iterator[Stage]:
    """One artifact per model and setting."""
    for name, steps, guidance in settings(models, config):
        images, rows = image_count(config), image_rows(steps, models.guidance(name, guidance))
        yield Stage(place(name, steps, guidance), f"{images} images", images * rows)
    yield Stage("report.html", "")


def protocol(config: Config, scorer: ClipScorer | None) -> dict[str, Any]:
    """What makes scores comparable beside the prompts."""
    described = {**(config.evaluation.preferences or {}), **(config.metrics or {})}
    file = config.evaluation.inception
    return {
        **(scorer.protocol if scorer else {}),
        "seed": config.eval.seed,
        "inception": file and digest(Path(file))[:12],
        "metrics": OmegaConf.to_container(OmegaConf.create(described), resolve=True),
    }


# ---- prompts ----


def evaluated_prompts(models: GivenModels, config: Config) -> tuple[PromptSet, dict[str, Tensor]]:
    """The prompts, and the first frames that they name: of models that take none the numbers of noises."""
    if not models.begin_with_frames or config.plan:
        return eval_prompts(config) if models.is_conditional else numbered_images(config.eval.prompts), {}
    count = config.eval.prompts + len(calibration_prompts(config))
    prompts, frames = load_first_frames(config, count, models.is_conditional)
    return without_calibration(prompts, config, MORE_FRAMES, MORE_FRAMES), frames


def have_captions(models: GivenModels, config: Config) -> bool:
    """Whether prompts say what is drawn: names of images in a folder do not."""
    return models.is_conditional or (models.begin_with_frames and not config.data.first_frames)


def eval_prompts(config: Config) -> PromptSet:
    """The requested prompts, without the calibration prompts of a pruned network."""
    ways = "data.prompt_file=FILE gives others", "data.prompt_file=FILE with more"
    return without_calibration(read_prompt_set(config), config, *ways)


def calibration_prompts(config: Config) -> list[str]:
    if not (file := config.evaluation.calibration_prompts):
        return []
    if not Path(file).is_file():
        message = f"evaluation.calibration_prompts={file} does not exist"
        raise FileNotFoundError(f"{message}; give prune_unet's prompts.json")
    return read_calibration_prompts(Path(file))


def without_calibration(prompts: PromptSet, config: Config, others: str, more: str) -> PromptSet:
    """others, more: the ways out where too few are left, or there."""
    count = config.eval.prompts
    if config.evaluation.calibration_prompts:
        return prompts.without(calibration_prompts(config), count, way=others)
    fewer = f"eval.prompts={len(prompts)} or fewer, or " if len(prompts) > 1 else ""
    return prompts.take(count, way=f"{fewer}{more}")


def seen_in_training(config: Config, prompts: PromptSet) -> dict[str, int]:
    """How many prompts the training images of the data have as captions; nothing where that is not known."""
    try:
        captions = known_captions(component(config, "data.pairs"), Path(storage(config).folder))
    except ValueError:
        return {}  # all images are held out, or the data have no other split
    return {} if captions is None else {"prompts_in_training_split": len(among(prompts, captions))}


# ---- models and metrics ----


def evaluator_of(
    models: GivenModels, config: Config, run: Run, prompts: PromptSet, scorer: ClipScorer | None,
    frames: Mapping[str, Tensor],
) -> Evaluator:  # fmt: skip
    """Raises ValueError, before anything is drawn, for a precision, metrics or real images that cannot be had."""
    device, evaluation = run.accelerator.device, config.evaluation
    precision = settled(config.sampling.precision, device)
    features = {"features": FeatureSimilarity(scorer)} if scorer else {}
    of_prompts = models.is_conditional, have_captions(models, config)
    metrics = {**load_metrics(config, scorer, device, *of_prompts), "psnr": Psnr(), **features}
    metrics = of_what_is_drawn({**metrics, **real_distance(config, scorer)}, models.draws_videos, scorer)
    if evaluation.inception:
        metrics["fid"] = InceptionDistance(Inception(evaluation.inception, device))

    def sampler(pipeline: DiffusionPipeline, steps: int, guidance: float) -> Sampler:
        return Sampler(pipeline, steps, guidance, config.eval.seed, precision=precision)

    @lru_cache(1)  # one model is in memory at a time
    def pipeline_of(name: str) -> DiffusionPipeline:
        pipeline = with_first_frames(to_device(models.load_named(name), device), frames)
        if evaluation.compile:
            compared_at = models.compared_at(name, config.curves.guidance)
            scales = [models.guidance(name, scale) for scale in compared_at]
            first = sampler(pipeline, models.steps(name)[0], scales[0])
            compile_pipeline(name, pipeline, first, scales, prompts, config, run)
        return pipeline

    def candidate(name: str, steps: int, guidance: float) -> Candidate:
        pipeline = pipeline_of(name)
        drawn = sampler(pipeline, steps, models.guidance(name, guidance))
        network = network_of(pipeline)
        parts = {"UNet": network, **({"decoder": drawn.codec.decoder} if drawn.codec else {})}
        facts = {"parameters": {name: count_parameters(part) for name, part in parts.items()},
                 "evaluations": drawn.evaluations(network)}  # fmt: skip
        reseeded = lambda seed: partial(drawn.reseeded(seed).images, network, prompts.prompts)  # noqa: E731
        return Candidate(reseeded(drawn.seed), drawn.protocol, facts, reseeded=reseeded)

    return Evaluator(config, run, candidate, prompts, metrics, scorer, models.reference)


def compile_pipeline(
    name: str, pipeline: DiffusionPipeline, sampler: Sampler, scales: Sequence[float], prompts: PromptSet,
    config: Config, run: Run,
) -> None:  # fmt: skip
    """Compiles UNet and VAE decoder by drawing a batch, with the graphs that an earlier process has left."""
    parts = [network_of(pipeline), *filter(None, [sampler.codec])]
    size, networks = min(config.eval.batch_size, len(prompts)), [described(part) for part in parts]
    guided = [scale > 1 for scale in scales]
    key = [*networks, size, guided, torch.__version__, run.accelerator.device.type]
    key += [] if sampler.precision == "float32" else [sampler.precision]
    file = Path(config.evaluation.artifacts) / f"{hashlib.sha256(str(key).encode()).hexdigest()[:16]}.bin"
    compile_networks(pipeline, InferenceConfig(compile="default"))
    kept, start = run.agreed(file.exists()), time.perf_counter()
    compile_first(file, lambda: sampler.images(network_of(pipeline), prompts.prompts, range(size)), run.accelerator)
    way = f"with {file}" if kept else f"which left {file}"
    log.info(f"{name}: first batch of compiled networks in {time.perf_counter() - start:.0f} s, {way}")


# ---- the report ----


def write_page(run: Run, evaluation: Evaluation) -> None:
    if seen := overlap_sentence(evaluation.n, evaluation.seen):
        log.info(seen)
    track = partial(track_table, run, "models", models_table(evaluation.points))
    write_evaluation_report(run.path, track)
