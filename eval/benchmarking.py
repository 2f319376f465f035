"""The benchmarks' rows: one pipeline in one inference config, timed beside others, with what its images lost by it.

A row is a file that is not made again. What a device cannot run is a row that says why.
"""

import copy
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from diffusers import DiffusionPipeline
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from slimstep.engine.environment import environment
from slimstep.engine.files import damaged, write_tensors
from slimstep.engine.names import disk_name
from slimstep.engine.parallel import free_memory
from slimstep.engine.run import Run
from slimstep.eval.config import Config
from slimstep.eval.given import LONGEST_NAME, given_models, settle_size
from slimstep.eval.inputs import load_scorer
from slimstep.eval.job import evaluated_prompts, have_captions
from slimstep.eval.metrics.clip import WITHOUT_SCORER, psnr
from slimstep.eval.metrics.compare import mean_and_error, paired_difference
from slimstep.eval.metrics.metric import as_metric
from slimstep.eval.metrics.video import on_frames
from slimstep.eval.timing.cold_start import compile_cost
from slimstep.eval.timing.inference import InferenceConfig, combinations
from slimstep.eval.timing.speed import BenchmarkCase, TimedPipeline, matmul_peak_tflops, measure, reason
from slimstep.models.cost import count_gflops
from slimstep.models.family import family_of
from slimstep.models.first_frames import with_first_frames
from slimstep.models.networks import network_of
from slimstep.models.pipeline import with_unet

log = logging.getLogger("slimstep")
CONFIG_FIELDS = [field.name for field in fields(InferenceConfig)]
CHOICES = [name for name in CONFIG_FIELDS if name != "capture"]  # what config.benchmark lists values of


class Benchmark:
    """Pipelines by name, what they are timed in, and what their images are compared with."""

    def __init__(self, config: Config, run: Run):
        """Raises ValueError, before anything is timed, for models or prompts that cannot be had."""
        if run.accelerator.num_processes > 1 and not config.plan:
            raise ValueError("times are those of one process: start the benchmark without accelerate launch's others")
        self.models = given_models(config, [config.eval.steps], "time")
        for name, model in self.models.models.items():
            own = [key for key in model.options if key != "first_stage"]
            if own := [*own, *(["guidance"] if model.guidance is not None else [])]:
                way = "time it by itself, with model.… and eval.guidance_scale, or an export of it"
                raise ValueError(f"models.{name} has {', '.join(own)}, which +experiment=evaluate alone reads: {way}")
            if model.options and [*self.models.paths.values()].count(model.path) > 1:
                way = "models of one path have one first_stage here: time them in runs of their own"
                raise ValueError(f"models.{name} is {model.path}, as another is: {way}")
        self.models.check()
        self.draws_videos = self.models.draws_videos
        if not (self.models.is_conditional or self.models.begin_with_frames):
            raise ValueError(f"{self.models.paths} take no prompts, and what is timed here begins with their encoding; "
                             "a DDPM's UNet is timed by +experiment=prune_ddpm")  # fmt: skip
        if (images := config.benchmark.images) > (prompts := config.eval.prompts):
            raise ValueError(f"benchmark.images={images} is more than eval.prompts={prompts}")
        self.config, self.run, self.device = copy.deepcopy(config), run, run.accelerator.device
        settle_size(self.models, self.config.data)
        self.base = base_config(config)
        self.inference_configs = combinations(**{name: list(config.benchmark[name]) for name in CHOICES})
        self.scorer = load_scorer(config, self.device)
        if self.scorer is None and self.models.is_conditional:
            raise ValueError(WITHOUT_SCORER)
        self.prompts, self.frames = evaluated_prompts(self.models, self.config)
        self.peaks: dict[str, float] = {}  # what was measured once, by dtype
        self.counted: dict[str, float] = {}  # what was counted once, by the UNet's configuration

    # ---- pipelines ----

    def assembled(self, case: BenchmarkCase) -> DiffusionPipeline:
        """A new pipeline, with parts of others where the case names them."""
        pipeline = self.models.load(case.model)
        unet = network_of(self.models.load(case.unet) if case.unet else pipeline)
        return with_unet(pipeline, unet, **({"vae": self.models.load(case.vae).vae} if case.vae else {}))

    def timed_pipeline(
        self, case: BenchmarkCase, batch: int, pipeline: DiffusionPipeline | None = None, **kwargs: Any
    ) -> TimedPipeline:
        """A pipeline made ready to be timed. Raises CannotRunError."""
        pipeline, config = with_first_frames(pipeline or self.assembled(case), self.frames), self.config.eval
        return TimedPipeline(pipeline, case.inference, self.prompts.prompts, case.steps, config.guidance_scale,
                       self.device, batch, config.seed, kwargs)  # fmt: skip

    # ---- rows ----

    def row(self, file: str, label: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """rows/`file`.json: what it is, and what was measured, or why nothing could be."""

        def made() -> dict[str, Any]:
            try:
                return {**label, "cannot": None, **make(), "environment": environment()}
            except Exception as error:
                if (why := reason(error)) is None:
                    raise
                log.warning(f"{file}: {why}")
                return {**label, "cannot": why}

        try:
            return self.run.json(f"rows/{file}.json", made)
        finally:
            free_memory()

    def measured(
        self, timed: TimedPipeline, others: Mapping[str, TimedPipeline], reference: Tensor | None = None
    ) -> dict[str, Any]:
        """Times, the share of the peak that the UNet reaches, and how far the images are from `reference`'s."""
        row = measure(timed, others, OmegaConf.to_object(self.config.latency))
        # One CUDA graph of the whole loop has no parts, and the peak of quantized products is not measured.
        if "UNet" in row["parts_ms"] and timed.inference.quantize == "none":
            achieved = self.row_gflops(timed.pipeline) * row["unet_rows"] / row["parts_ms"]["UNet"]  # 10⁹/ms is 10¹²/s
            peak = self.peak_tflops(timed.inference)
            row |= {"unet_tflops": achieved, "peak_tflops": peak, "share_of_peak": achieved / peak}
        return row if reference is None else {**row, **self.quality(timed.images(len(reference)), reference)}

    def cold_start(self, case: BenchmarkCase, batch: int, file: str) -> dict[str, Any]:
        """What compiling costs, in processes of their own: cold-start/`file`.json."""
        config, old = self.config.eval, f"first-image/{file}.json"
        name = old if (self.run.path / old).exists() else f"cold-start/{file}.json"
        parts, prompts = (case.model, case.unet, case.vae), list(self.prompts.prompts[:batch])
        first_frames = self.run.path / "cold-start/first_frames.safetensors" if self.frames else None
        if first_frames:
            write_tensors(first_frames, {prompt: self.frames[prompt] for prompt in prompts})
        request = {**asdict(case), "batch": batch, "guidance_scale": config.guidance_scale, "seed": config.seed,
                   "prompts": prompts, "first_frames": first_frames and str(first_frames), "device": str(self.device),
                   "options": {where: self.models.options(where) for where in parts if where},
                   "resolution": self.models.pixels, "frames": self.models.frames}  # fmt: skip
        free_memory()  # the processes want it
        return self.run.json(name, lambda: compile_cost(request, self.run.path / f"artifacts/{file}.bin"))

    def row_gflops(self, pipeline: DiffusionPipeline) -> float:
        """10⁹ operations of one evaluation of the denoiser for one row."""
        network = network_of(pipeline)
        unet = getattr(network, "_orig_mod", network)  # without torch.compile around it
        key = str(dict(unet.config))
        if key not in self.counted:
            self.counted[key] = count_gflops(unet, None, 1, family_of(pipeline).tokens(pipeline))
        return self.counted[key]

    def peak_tflops(self, inference: InferenceConfig) -> float:
        """What this device reaches in matrix products of a number format, measured once."""
        if inference.dtype not in self.peaks:
            self.peaks[inference.dtype] = matmul_peak_tflops(inference, self.device)
        return self.peaks[inference.dtype]

    def quality(self, images: Tensor, reference: Tensor) -> dict[str, Any]:
        """PSNR in dB to the reference's images from the same noise, and CLIP score, paired with theirs, where there are
        captions; of videos the means over frames."""
        near = psnr(images, reference).tolist() if images.shape == reference.shape else None
        found = {"psnr": near and asdict(mean_and_error(near))}
        if self.scorer is None or not have_captions(self.models, self.config):
            return found
        prompts, clip = self.prompts.prompts[: len(images)], as_metric(self.scorer)
        metric = on_frames(clip) if self.draws_videos else clip
        scores, base = (metric(drawn, prompts).tolist() for drawn in (images, reference))
        difference = asdict(paired_difference(scores, base))
        return {**found, "clip": asdict(mean_and_error(scores)), "clip_difference": difference}

    def reference_images(self, name: str, case: BenchmarkCase) -> Tensor:
        """What a case draws, one image at a time: reference/`name`.safetensors."""
        file = self.run.path / f"reference/{name}.safetensors"
        if not file.exists():
            write_tensors(file, {"images": self.timed_pipeline(case, 1).images(self.config.benchmark.images)})
        with damaged(file):
            return load_file(file)["images"]

    def results(self, kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """results.json: the rows, and what they were measured on."""
        config = self.config
        return self.run.json("results.json", lambda: {
            "kind": kind,
            "models": self.models.paths,
            "rows": rows,
            "protocol": {"base": asdict(self.base), "warmup": config.latency.warmup, "seconds": config.latency.seconds,
                         "steps": config.eval.steps, "guidance_scale": config.eval.guidance_scale,
                         "seed": config.eval.seed, "images": config.benchmark.images, "prompts": self.prompts.hash,
                         "clock": "wall" if self.device.type == "cuda" else "CPU time of one thread",
                         "iterations": config.latency.iterations, "scorer": self.scorer and self.scorer.protocol},
            "environment": environment(),
        })  # fmt: skip


def base_config(config: Config) -> InferenceConfig:
    """What ratios are to."""
    requested = OmegaConf.to_container(config.benchmark).get("base") or {}
    if unknown := set(requested) - set(CONFIG_FIELDS):
        raise ValueError(f"benchmark.base names {sorted(unknown)}; an inference config has {CONFIG_FIELDS}")
    return InferenceConfig(**requested)


def file_name(words: str) -> str:
    return disk_name(re.sub(r"\W+", "-", words).strip("-").lower(), LONGEST_NAME)
