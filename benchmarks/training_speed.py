"""Memory and speed of every kind of training: a few steps of the jobs' own stages, each in a process of its own.

    python benchmarks/training_speed.py --size sd15 --resolution 512 --batch 8 --precision bf16   # a GPU
    python benchmarks/training_speed.py --size sd15 --resolution 64 --optimizer adafactor --ema-decay 0  # 20 GB, a CPU
    python benchmarks/training_speed.py --size shapes                                             # the bundled model

Weights are random (but the bundled model's), data are scenes of data=shapes. Operations are the networks' own: a
backward is two forwards, what gradient checkpointing computes again is not counted. The peak is a matrix product's in
this precision on this device. A CPU's memory is the whole process's, a GPU's what torch
allocated from the end of the first step on.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hydra
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from torch import nn

import slimstep.engine.launch  # noqa: F401  registers the resolvers
from slimstep.configs.schema import Config
from slimstep.distill.job import distilled as distilled_steps
from slimstep.distill.job import trained_copy
from slimstep.distill.network import distillation_of
from slimstep.engine.checked import CONFIGS, ROOT
from slimstep.engine.config import TrainConfig
from slimstep.engine.console import open_console
from slimstep.engine.environment import environment
from slimstep.engine.files import write_json
from slimstep.engine.run import Run
from slimstep.eval.decoders import decoder_gflops
from slimstep.eval.inputs import Teacher, load_metrics, load_prompts, load_scorer, teacher_of, training_data
from slimstep.eval.pages.tables import markdown_table
from slimstep.eval.timing.child import child_result
from slimstep.eval.timing.inference import CannotRunError, InferenceConfig
from slimstep.eval.timing.speed import matmul_peak_tflops
from slimstep.eval.training import train_stage
from slimstep.models.cost import count_gflops
from slimstep.models.known import random_pipeline
from slimstep.models.pipeline import load_pipeline, networks
from slimstep.prune.job import prunable_copy
from slimstep.prune.rounds import Measures
from slimstep.prune.vae_job import decoder_pruning, distilled, pruned_decoder

JOBS = {"stochastic_depth": "prune_unet", "scoring": "prune_unet", "recovery": "prune_unet", "steps": "distill_steps",
        "decoder": "prune_vae"}  # fmt: skip
DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
TRAINING, GB = 3, 1e9  # forwards in a forward and its backward


class Rates:
    """Stands in a run for a tracker, and keeps the loop's own samples per second; memory counts from the first step on,
    which has made gradients and moments, and may have compiled."""

    def __init__(self, device: torch.device):
        self.device, self.seen = device, []

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self.seen.append(metrics["samples_per_second"])
        if len(self.seen) == 1:
            count_memory_from_here(self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("sd15", "sdxl", "shapes"), default="sd15")
    parser.add_argument("--parts", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--resolution", type=int, help="pixels (default: what the model is made for)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="the first is not timed")
    parser.add_argument("--precision", choices=DTYPES, default="no")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--ema-decay", type=float, default=0.999, help="0 keeps no EMA")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--compile", action="store_true", help="but recovery, which reads features with hooks")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/training-speed"), help="where the results go")
    parser.add_argument("--alone", choices=JOBS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure(options)))
        return
    requested = {key: value for key, value in vars(options).items() if key not in ("out", "alone", "parts")}
    rows = []
    for part in options.parts:
        rows.append(in_a_process(part))
        write_json(options.out / "results.json", {**requested, "environment": environment(), "rows": rows})
    names = ("part", "batch", "peak_gb", "seconds_per_step", "samples_per_second", "tflops", "share_of_peak")
    print(markdown_table(list(names), [[cell(row.get(name)) for name in names] for row in rows]))
    for row in rows:
        if row.get("cannot"):
            print(f"{row['part']}: {row['cannot']}")


def in_a_process(part: str) -> dict:
    """The part's row, or the reason why there is none."""
    try:
        return child_result([sys.executable, *sys.argv, "--alone", part])
    except CannotRunError as error:
        return {"part": part, "cannot": str(error)}


def cell(value: float | str | None) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def measure(options: argparse.Namespace) -> dict:
    """One part in this process."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=options.precision)
        rates = Rates(accelerator.device)
        run = Run(Path(folder) / "run", accelerator, tracker=rates)
        teacher = teacher_of(model(options), configured(options, folder), run)
        rows_per_step, gflops, seconds = globals()[f"measure_{options.alone}"](teacher)
    if seconds is None:
        seconds = options.batch / statistics.median(rates.seen[1:])
    memory = peak_memory(accelerator.device)  # of the training: the matrix products below take memory, too
    peak = matmul_peak_tflops(InferenceConfig(dtype=DTYPES[options.precision]), accelerator.device)
    tflops = gflops / 1e3 / seconds
    return {
        "part": options.alone,
        "batch": rows_per_step,
        **{name: size / GB for name, size in memory.items()},
        "seconds_per_step": seconds,
        "samples_per_second": rows_per_step / seconds,
        "gflops_per_step": gflops,
        "tflops": tflops,
        "matmul_peak_tflops": peak,
        "share_of_peak": tflops / peak,
    }


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: of the process on a CPU; on a GPU allocated, and reserved by torch, since the first step."""
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
        return {"peak_gb": torch.cuda.max_memory_allocated(device), "reserved_gb": reserved}
    return {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def count_memory_from_here(device: torch.device) -> None:
    """What made data and networks is not counted on a GPU; a CPU's process remembers its largest size."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def model(options: argparse.Namespace):
    """The pipeline; what predicts v needs no step of its own before distillation."""
    if options.size == "shapes":
        return load_pipeline(ROOT / "assets/shapes")
    pipeline = random_pipeline(options.size)
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    return pipeline


def configured(options: argparse.Namespace, folder: str) -> Config:
    steps, batch = options.steps, options.batch
    overrides = [
        f"+experiment={JOBS[options.alone]}", f"root={folder}", f"data.pairs.size={max(4 * batch, 16)}",
        "data.prompts.n=8", f"data.resolution={options.resolution or 'null'}", f"mixed_precision={options.precision}",
        "eval.prompts=2", f"data.cache.batch_size={batch}", "scoring.prompts=2",
        "scoring.steps=1", f"scoring.batch_size={2 * batch}", "scoring.guidance_scale=1",
    ]  # fmt: skip
    for train in ("train", "recovery.train"):
        compiled = options.compile and train == "train"
        overrides += [f"{train}.steps={steps}", f"{train}.batch_size={batch}", f"{train}.log_every=1",
                  f"{train}.optimizer={options.optimizer}", f"{train}.compile={str(compiled).lower()}",
                  f"{train}.ema_decay={options.ema_decay}",
                  f"{train}.gradient_checkpointing={str(options.checkpointing).lower()}"]  # fmt: skip
    if options.alone == "decoder":
        overrides += ["latents.real_share=1", "latents.count=16", "latents.prompts=8", "decoder.importance=first"]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.merge(OmegaConf.structured(Config), hydra.compose("train", overrides))


# ---- the parts: samples per step, 10⁹ operations per step, and seconds where the loop has not measured them ----


def measure_stochastic_depth(teacher: Teacher) -> tuple[int, float, None]:
    config = teacher.config
    unet = train(teacher, prunable_copy(teacher), "round-00", config.objective, config.train)
    return config.train.batch_size, TRAINING * config.train.batch_size * forward(teacher, unet), None


def measure_recovery(teacher: Teacher) -> tuple[int, float, None]:
    stage = teacher.config.recovery
    pruned = prunable_copy(teacher).with_architecture({"mid_block.attentions.0": 0})
    unet = train(teacher, pruned, "recovery", stage.objective, stage.train)
    gflops = TRAINING * forward(teacher, unet) + forward(teacher, teacher.unet)
    return stage.train.batch_size, stage.train.batch_size * gflops, None


def measure_scoring(teacher: Teacher) -> tuple[int, float, float]:
    """Images of the block scores, not training: a step is one batch of them, its decoding and scoring included."""
    unet, config, (calibration, _) = teacher.unet, teacher.config, load_prompts(teacher)
    metrics = load_metrics(config, load_scorer(config, teacher.device), teacher.device)
    count_memory_from_here(teacher.device)
    start = time.perf_counter()
    Measures(teacher, calibration=calibration, metrics=metrics).scores(unet, "round-00")
    batch, images = config.scoring.batch_size, (1 + len(unet.kept_blocks)) * config.scoring.prompts
    return batch, batch * forward(teacher, unet), (time.perf_counter() - start) / images * batch


def measure_steps(teacher: Teacher) -> tuple[int, float, None]:
    job, config, pairs = distillation_of(teacher), teacher.config.train, cache(partial(training_data, teacher))
    (stage, *_), unets = job.stages, {"teacher": teacher.unet, "student": job.student}
    unet = distilled_steps(job, stage, unets, pairs, partial(trained_copy, job, pairs, [*networks(teacher.pipeline)]))
    guided = -(-config.batch_size // 10)  # objective.guided_share, rounded up; each is one row more
    forwards = TRAINING + stage.teacher_steps // stage.steps
    return config.batch_size, (config.batch_size + guided) * forwards * forward(teacher, unet), None


def measure_decoder(teacher: Teacher) -> tuple[int, float, None]:
    config, data, (_, prompts) = teacher.config, cache(partial(training_data, teacher)), load_prompts(teacher)
    teacher.pipeline.vae.float()
    job = decoder_pruning(teacher)
    student = distilled(job, pruned_decoder(job, data), prompts, data, [*networks(teacher.pipeline)])
    batch, size = config.train.batch_size, teacher.unet.config.sample_size
    return batch, batch * (decoder_gflops(job.vae, size) + TRAINING * decoder_gflops(student, size)), None


def train(teacher: Teacher, unet: nn.Module, stage: str, objective: Any, config: TrainConfig) -> nn.Module:
    pairs = partial(training_data, teacher)
    return train_stage(unet, stage, objective, config, teacher, cache(pairs), [*networks(teacher.pipeline)])


def forward(teacher: Teacher, unet: nn.Module) -> float:
    """10⁹ operations of one row through the UNet."""
    return count_gflops(unet, tokens=teacher.text_length)


if __name__ == "__main__":
    open_console()
    main()
