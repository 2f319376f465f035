"""The one training loop. A job supplies an objective; the loop owns the optimiser, EMA, logging and checkpoints.

Nothing random is remembered. Micro-batch g of step s (g counts all processes and accumulation steps) takes the
samples at a fixed place of a fixed order, and draws from a generator seeded by (seed, stage, s, g): a continued run
repeats what an uninterrupted one does, and two processes do what one does with twice the accumulation.
"""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from data.files import write_tensors, write_text
from data.progress import progress
from data.seeding import generator, seed_of
from engine.config import TrainConfig
from engine.run import Run

Batch = dict[str, Any]
Metrics = dict[str, Tensor]
WEIGHTS = "weights.safetensors"

Objective = Callable[[nn.Module, Batch, torch.Generator], tuple[Tensor, Metrics]]


class StepBatches(Sampler[list[int]]):
    """This rank's index lists from `first_step` on: a function of (seed, step, micro-step, rank) alone."""

    def __init__(self, size: int, config: TrainConfig, seed: int, first_step: int, rank: int, world: int):
        self.size, self.config, self.seed, self.first_step, self.rank, self.world = (
            size, config, seed, first_step, rank, world)  # fmt: skip
        self.epoch, self.order = -1, []

    def sample_at(self, position: int) -> int:
        """The sample at `position` of the endless stream of shuffled epochs."""
        epoch, place = divmod(position, self.size)
        if epoch != self.epoch:
            order = torch.randperm(self.size, generator=generator(self.seed, "order", epoch))
            self.epoch, self.order = epoch, order.tolist()
        return self.order[place]

    def __iter__(self) -> Iterator[list[int]]:
        config = self.config
        for step in range(self.first_step, config.steps):
            for micro in range(config.accumulation):
                batch = (step * config.accumulation + micro) * self.world + self.rank
                yield [self.sample_at(batch * config.batch_size + k) for k in range(config.batch_size)]

    def __len__(self) -> int:
        return (self.config.steps - self.first_step) * self.config.accumulation


class RunningMeans:
    """The metrics since they were last logged; every checkpoint follows a log line, so none of this is saved."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: Metrics) -> None:
        """Sums on the device: no host synchronisation per step."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.count += 1

    def take(self, accelerator) -> dict[str, float]:
        """The means since the last call over all processes, and a new start."""
        names = sorted(self.sums)
        means = torch.stack([self.sums[name] for name in names]) / self.count
        values = accelerator.reduce(means, "mean").tolist()
        self.sums, self.count = {}, 0
        return dict(zip(names, values, strict=True))


class DeviceEMA(EMAModel):
    """EMAModel whose averages stay with the parameters: a checkpoint is read to the CPU."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        devices = [average.device for average in self.shadow_params]
        super().load_state_dict(state_dict)
        self.shadow_params = [average.to(d) for average, d in zip(self.shadow_params, devices, strict=True)]


class Speedometer:
    """Samples per second since it was last asked."""

    def __init__(self, samples_per_step: int, step: int):
        self.samples_per_step, self.step, self.seconds = samples_per_step, step, time.perf_counter()

    def samples_per_second(self, step: int) -> float:
        now = time.perf_counter()
        speed = (step - self.step) * self.samples_per_step / (now - self.seconds)
        self.step, self.seconds = step, now
        return speed


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant or a cosine to zero at `config.steps`."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay = 0.5 + 0.5 * math.cos(math.pi * step / config.steps) if config.schedule == "cosine" else 1.0
    return config.learning_rate * warmup * decay


def train(
    model: nn.Module, objective: Objective, dataset: Dataset, config: TrainConfig, run: Run, stage: str
) -> nn.Module:
    """Trains `model` in place under `runs/<name>/<stage>/` and returns it in eval mode, with its EMA weights.

    Continues from the newest whole checkpoint; where the finished weights exist they are loaded and nothing is trained.
    Raises FloatingPointError when the loss is not finite, ValueError when the checkpoint was made by another number of
    processes or the data set is empty.
    """
    config = OmegaConf.to_object(config) if OmegaConf.is_config(config) else config
    folder = run.path / stage
    if trained(run, stage):
        return load_trained(model, run, stage)
    if len(dataset) == 0:
        raise ValueError(f"the data set of stage {stage!r} is empty; look at data=...")
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    folder.mkdir(parents=True, exist_ok=True)
    model = _run_steps(model.train(), objective, dataset, config, run, stage)
    if run.accelerator.is_main_process:
        write_tensors(folder / WEIGHTS, model.state_dict())
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    run.accelerator.wait_for_everyone()
    if config.gradient_checkpointing:
        model.disable_gradient_checkpointing()
    return model.eval()


def trained(run: Run, stage: str) -> bool:
    """Whether the stage has its finished weights."""
    return run.made(f"{stage}/{WEIGHTS}")


def load_trained(model: nn.Module, run: Run, stage: str) -> nn.Module:
    """`model` with the stage's finished weights, in eval mode."""
    device = str(next(model.parameters()).device)
    model.load_state_dict(load_file(run.path / stage / WEIGHTS, device=device))
    return model.eval()


def _run_steps(
    model: nn.Module, objective: Objective, dataset: Dataset, config: TrainConfig, run: Run, stage: str
) -> nn.Module:
    accelerator = run.accelerator
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"betas": tuple(config.betas), "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, **options)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    ema = DeviceEMA(parameters, decay=config.ema_decay, foreach=True) if config.ema_decay else None
    if ema:
        accelerator.register_for_checkpointing(ema)
    means = RunningMeans()
    checkpoints = Checkpoints(run.path / stage / "checkpoints", config.keep_checkpoints, accelerator)
    first_step = checkpoints.load_newest()
    run.rewind(stage, first_step)
    seed = seed_of(run.seed, stage)
    batches = _batches(dataset, config, seed, first_step, accelerator)
    speedometer = Speedometer(config.batch_size * config.accumulation * accelerator.num_processes, first_step)
    quiet = not accelerator.is_main_process
    bar = progress(total=config.steps, initial=first_step, desc=stage, unit="step", disable=quiet)
    for step in range(first_step, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        for micro in range(config.accumulation):
            place = micro * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(seed_of(seed, step, place, "global"))  # dropout inside networks draws from here
            draw = generator(seed, step, place, device=accelerator.device)
            syncing = micro == config.accumulation - 1
            with contextlib.nullcontext() if syncing else accelerator.no_sync(wrapped):
                with accelerator.autocast():
                    loss, metrics = objective(wrapped, {**next(batches), "progress": step / config.steps}, draw)
                accelerator.backward(loss / config.accumulation)
            means.add({"loss": loss, **metrics})
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.step(parameters)
        bar.update()
        done = step + 1
        saving = done % config.checkpoint_every == 0 and done < config.steps
        if saving or done % config.log_every == 0 or done == config.steps:
            values = _checked(means.take(accelerator), stage, done, checkpoints.folder)
            speed = speedometer.samples_per_second(done)
            run.log(stage, done, {**values, "lr": learning_rate_at(step, config)}, {"samples_per_second": speed})
            bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        if saving:
            checkpoints.save(done)
    bar.close()
    if ema:
        ema.copy_to(parameters)
    accelerator.free_memory()
    accelerator._custom_objects.clear()  # free_memory forgets models and optimisers, not what was registered
    # Without accelerate's autocast around it: a network just trained and one read from its file compute alike.
    return accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)


def _batches(dataset: Dataset, config: TrainConfig, seed: int, first_step: int, accelerator) -> Iterator[Batch]:
    rank, world = accelerator.process_index, accelerator.num_processes
    loader = DataLoader(
        dataset,
        batch_sampler=StepBatches(len(dataset), config, seed, first_step, rank, world),
        collate_fn=getattr(dataset, "collate", None),
        num_workers=config.workers,
        generator=torch.Generator(),  # its own, so that workers never draw from the global one
        pin_memory=accelerator.device.type == "cuda",
    )
    for batch in loader:
        yield {k: v.to(accelerator.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def _checked(means: dict[str, float], stage: str, step: int, checkpoints: Path) -> dict[str, float]:
    if not math.isfinite(means["loss"]):
        raise FloatingPointError(
            f"the loss of stage {stage!r} is {means['loss']} at step {step}; lower train.learning_rate or look at the "
            f"data. The last good checkpoint is kept in {checkpoints}"
        )
    return means


class Checkpoints:
    """Accelerate states under `folder/step-00001000`, written aside and renamed; the newest few are kept."""

    def __init__(self, folder: Path, keep: int, accelerator):
        self.folder, self.keep, self.accelerator = folder, keep, accelerator

    def steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def save(self, step: int) -> None:
        aside = self.folder / f".step-{step:08d}.aside"
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(aside))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_text(aside / "made_by.json", json.dumps({"processes": self.accelerator.num_processes}))
            aside.rename(self.folder / f"step-{step:08d}")
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step-{old:08d}")
        self.accelerator.wait_for_everyone()

    def load_newest(self) -> int:
        """Loads the newest checkpoint and returns its step; 0 where there is none."""
        steps = self.steps()
        if not steps:
            return 0
        path = self.folder / f"step-{steps[-1]:08d}"
        processes = json.loads((path / "made_by.json").read_text())["processes"]
        if processes != self.accelerator.num_processes:
            raise ValueError(
                f"{path} was made by {processes} process(es) and this is {self.accelerator.num_processes}; "
                f"start with {processes}, or remove the folder to begin the stage again"
            )
        self.accelerator.load_state(str(path))
        return steps[-1]
