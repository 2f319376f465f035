"""The one training loop. A job supplies an objective; the loop owns the optimisers, EMA, logging and checkpoints.

A step is one update of the student, or those that the objective names, each of one network by its own optimiser.
Nothing random is remembered. Micro-batch g of step s (g counts its updates, accumulation steps and all processes) takes
the samples at a fixed place of a fixed order, and draws from a generator seeded by (seed, stage, s, g): a continued run
repeats what an uninterrupted one does, and two processes do what one does with twice the accumulation.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from slimstep.engine.checkpoints import Checkpoints
from slimstep.engine.config import TrainConfig
from slimstep.engine.ema import DeviceEMA
from slimstep.engine.files import damaged, unwritable, write_tensors
from slimstep.engine.low_rank import add_low_rank, low_rank_weights, merge_low_rank
from slimstep.engine.monitor import Monitor, Watch
from slimstep.engine.objective import (
    STUDENT,
    Batch,
    Metrics,
    Objective,
    PlainObjective,
    as_objective,
    check_requirements,
)
from slimstep.engine.optimizers import set_learning_rate
from slimstep.engine.preemption import NotedSignals, leave_signals_to_the_parent
from slimstep.engine.progress import progress
from slimstep.engine.run import Run
from slimstep.engine.seeding import generator, seed_of
from slimstep.engine.sharding import as_number, copy_to_shard, is_sharded, whole_weights, with_room
from slimstep.engine.trained import prepared

WEIGHTS = "weights.safetensors"
LOW_RANK = "low_rank.safetensors"  # the update that train.lora_rank trained, which is in the weights, too


class Samples(Protocol):
    """What is trained on: samples by index, and how many there are. Where it has `collate`, that makes its batches."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(eq=False)
class StepBatches(Sampler[list[int]]):
    """This rank's index lists from `first_step` on: a function of (seed, step, update, micro-step, rank) alone."""

    size: int
    config: TrainConfig
    seed: int
    first_step: int
    rank: int
    world: int
    num_updates: Callable[[int], int] = lambda step: 1

    def __post_init__(self) -> None:
        self.first_update, self.last_update = (
            sum(map(self.num_updates, range(step))) for step in (self.first_step, self.config.steps)
        )
        self.epoch, self.order = -1, torch.empty(0)

    def sample_at(self, position: int) -> int:
        """The sample at `position` of the endless stream of shuffled epochs."""
        epoch, place = divmod(position, self.size)
        if epoch != self.epoch:
            self.order = torch.randperm(self.size, generator=generator(self.seed, "order", epoch))  # 8 bytes a sample
            self.epoch = epoch
        return int(self.order[place])

    def __iter__(self) -> Iterator[list[int]]:
        config = self.config
        for update in range(self.first_update, self.last_update):
            for micro in range(config.accumulation):
                batch = (update * config.accumulation + micro) * self.world + self.rank
                yield [self.sample_at(batch * config.batch_size + k) for k in range(config.batch_size)]

    def __len__(self) -> int:
        return (self.last_update - self.first_update) * self.config.accumulation


class RunningMeans:
    """The metrics since they were last logged; every checkpoint follows a log line, so none of this is saved."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.finite: list[Tensor] = []  # per step: whether its losses and gradients were finite on this rank
        self.checked: list[Tensor] = []  # of the step that has begun

    def add(self, update: str, metrics: Metrics) -> None:
        """Sums on the device: no host synchronisation per step. What is not the student's has its network's name."""
        for name, value in metrics.items():
            name = logged_name(update, name)
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def end_update(self, update: str, grad_norm: Tensor | None) -> None:
        """Closes an update; `grad_norm` None where a gradient that overflows is no fault (float16's loss scaling)."""
        self.checked.append(self.sums[logged_name(update, "loss")])
        if grad_norm is not None:
            self.add(update, {"grad_norm": grad_norm})
            self.checked.append(self.sums[logged_name(update, "grad_norm")])

    def end_step(self) -> None:
        self.finite.append(torch.stack(self.checked).isfinite().all())
        self.checked = []

    def take(self, accelerator: Accelerator) -> tuple[dict[str, float], int | None]:
        """The means since the last call over all processes, and a new start.

        Beside them which of the steps, counted from 0, was the first that was not finite on this rank, if one was.
        """
        names = sorted(self.sums)
        means = torch.stack([self.sums[name] / self.counts[name] for name in names])
        values = accelerator.reduce(means, "mean").tolist()
        bad = (~torch.stack(self.finite)).nonzero().flatten().tolist()
        self.sums, self.counts, self.finite = {}, {}, []
        return dict(zip(names, values, strict=True)), bad[0] if bad else None


def logged_name(update: str, metric: str) -> str:
    return metric if update == STUDENT else f"{update}/{metric}"


def learning_rate_at(step: int, config: TrainConfig, network: str = STUDENT) -> float:
    """Linear warm-up, then constant or a cosine to zero at `config.steps`."""
    learning_rate = (config.learning_rates or {}).get(network, config.learning_rate)
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay = 0.5 + 0.5 * math.cos(math.pi * step / config.steps) if config.schedule == "cosine" else 1.0
    return learning_rate * warmup * decay


def train(
    model: nn.Module,
    objective: Objective | PlainObjective,
    dataset: Samples,
    config: TrainConfig,
    run: Run,
    stage: str,
    monitor: Monitor | None = None,
) -> nn.Module:
    """Trains `model` in place under `runs/<name>/<stage>/` and returns it in eval mode, with its EMA weights.

    Networks that the objective trains beside it are trained in place, too, and only checkpoints keep them.

    Continues from the newest whole checkpoint; where the finished weights exist they are loaded and nothing is trained.
    `monitor` is what `train.evaluate_every` has look at the student. Raises FloatingPointError when the loss is not
    finite, or a metric is beyond the objective's limits, ValueError when the checkpoint was made by another number of
    processes or with other networks, the data set is empty, or the objective cannot be trained in this way.
    """
    config = cast(TrainConfig, OmegaConf.to_object(config)) if OmegaConf.is_config(config) else config
    folder = run.path / stage
    if trained(run, stage):
        return load_trained(model, run, stage)
    if len(dataset) == 0:
        raise ValueError(f"the data set of stage {stage!r} is empty; look at data=...")
    check_requirements(objective, config, run.accelerator, is_monitored=monitor is not None)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]  # diffusers' networks have it
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    folder.mkdir(parents=True, exist_ok=True)
    sharded = is_sharded(run.accelerator)
    if config.lora_rank:
        add_low_rank(model, config.lora_rank, seed_of(run.seed, stage, "low rank"))
    student = copy_to_shard(model, run.accelerator) if sharded else model
    with NotedSignals() as signals:
        weights = _run_steps(student, as_objective(objective), dataset, config, run, stage, signals, monitor)
        if config.lora_rank:
            if run.accelerator.is_main_process:
                write_tensors(folder / LOW_RANK, low_rank_weights(model))
            merge_low_rank(model)
            weights = model.state_dict()
        if run.accelerator.is_main_process:
            write_tensors(folder / WEIGHTS, weights)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        run.accelerator.wait_for_everyone()
    if sharded:
        load_trained(with_room(model, run.accelerator.device), run, stage)
    if config.compile:
        torch.compiler.reset()  # dynamo keeps eight graphs of a forward, whosever it is: the next stage wants its own
    if config.gradient_checkpointing:
        model.disable_gradient_checkpointing()  # type: ignore[operator]
    if config.channels_last:
        model.to(memory_format=torch.contiguous_format)
    return model.eval()


def trained(run: Run, stage: str) -> bool:
    """Whether the stage has its finished weights."""
    return run.made(f"{stage}/{WEIGHTS}")


def load_trained(model: nn.Module, run: Run, stage: str) -> nn.Module:
    """`model` with the stage's finished weights, in eval mode."""
    if run.accelerator.is_main_process:
        shutil.rmtree(run.path / stage / "checkpoints", ignore_errors=True)  # a kill may have left them
    device = str(next(model.parameters()).device)
    with damaged(run.path / stage / WEIGHTS):
        state = load_file(run.path / stage / WEIGHTS, device=device)
        if different := state.keys() ^ model.state_dict().keys():
            raise ValueError(f"its tensors are those of another network, as {min(different)}")
        model.load_state_dict(state)
    return model.eval()


def _run_steps(
    student: nn.Module,
    objective: Objective,
    dataset: Samples,
    config: TrainConfig,
    run: Run,
    stage: str,
    signals: NotedSignals,
    monitor: Monitor | None,
) -> dict[str, Tensor]:
    """Trains `student` in place; its finished weights, whole, on rank 0 at least."""
    accelerator = run.accelerator
    beside, names = objective.networks, objective.requires.networks
    assert tuple(beside) == names, f"{type(objective).__name__} requires {names} and trains {tuple(beside)}"
    for other in beside.values():  # as the student; they go when the stage is finished
        if config.gradient_checkpointing and hasattr(other, "enable_gradient_checkpointing"):
            other.enable_gradient_checkpointing()  # type: ignore[operator]
        if config.channels_last:
            other.to(memory_format=torch.channels_last)
    modules = {name: network.train() for name, network in {STUDENT: student, **beside}.items()}
    networks = prepared(modules, config, accelerator)
    averaged = networks[STUDENT].parameters
    ema = DeviceEMA(averaged, decay=config.ema_decay) if config.ema_decay else None
    means = RunningMeans()
    folder = run.path / stage / "checkpoints"
    checkpoints = Checkpoints(folder, config.keep_checkpoints, accelerator, ema, tuple(networks))
    first_step = checkpoints.load_newest(run.agreed)
    run.rewind(stage, first_step)
    watch = Watch(monitor, run, stage, config) if monitor and config.evaluate_every else None
    seed = seed_of(run.seed, stage)
    batches = _batches(dataset, objective, config, seed, first_step, accelerator)
    samples, since = 0, time.perf_counter()  # since they were last logged
    quiet = not accelerator.is_main_process
    bar = progress(total=config.steps, initial=first_step, desc=stage, unit="step", disable=quiet)
    logged = first_step
    for step in range(first_step, config.steps):
        for nth, update in enumerate(objective.updates(step)):
            trained = networks[update]
            for name, network in networks.items():
                network.wants_gradients(name == update)
            called = {name: n.learning if name == update else n.beside for name, n in networks.items()}
            set_learning_rate(trained.optimizer, learning_rate_at(step, config, update))
            for micro in range(config.accumulation):
                place = (nth * config.accumulation + micro) * accelerator.num_processes + accelerator.process_index
                torch.manual_seed(seed_of(seed, step, place, "global"))  # dropout inside networks draws from here
                draw = generator(seed, step, place, device=accelerator.device)
                batch = {**next(batches), "progress": step / config.steps, "nth": nth}
                syncing = micro == config.accumulation - 1
                with contextlib.nullcontext() if syncing else accelerator.no_sync(trained.learning):
                    with accelerator.autocast():
                        loss, metrics = objective.loss(called, batch, draw, update)
                    accelerator.backward(loss / config.accumulation)
                means.add(update, {"loss": loss, **metrics})
                samples += config.batch_size * accelerator.num_processes
            grad_norm = accelerator.clip_grad_norm_(trained.learning.parameters(), config.max_grad_norm)
            means.end_update(update, None if accelerator.scaler else as_number(grad_norm, accelerator))
            trained.optimizer.step()
            trained.optimizer.zero_grad(set_to_none=True)
            if ema and update == STUDENT:
                ema.step(averaged)
        means.end_step()
        bar.update()
        done = step + 1
        saving = done % config.checkpoint_every == 0 and done < config.steps
        reporting = saving or done % config.log_every == 0 or done == config.steps
        if reporting:
            came = signals.on_any_rank(accelerator) if done < config.steps else []
            values, bad = means.take(accelerator)
            if bad is not None:
                _stop_at(logged + bad, dataset, objective, config, run, stage)
            check_limits(objective, values, run.path / stage, done)
            logged = done
            now = time.perf_counter()
            rates = {"samples_per_second": samples / (now - since)}
            samples, since = 0, now
            lr = {logged_name(name, "lr"): learning_rate_at(step, config, name) for name in networks}
            run.log(stage, done, {**values, **lr}, rates, tracked=not came)
            losses = {name: f"{value:.4f}" for name, value in values.items() if name.endswith("loss")}
            bar.set_postfix(losses, refresh=False)
        if watch and (done % config.evaluate_every == 0 or done == config.steps):
            watch.look(networks[STUDENT], ema, done)  # before the checkpoint: after it nothing of this step is logged
        if reporting:
            if saving or came:
                checkpoints.save(done)
            if came:
                signals.take_course(came)
    bar.close()
    if ema:
        ema.copy_to(averaged)
    if watch and config.keep_best:
        watch.restore_best(networks[STUDENT])
    for network in networks.values():
        network.wants_gradients(True)
    bare = {name: network.bare(accelerator) for name, network in networks.items()}
    weights = whole_weights(bare[STUDENT], accelerator)
    accelerator.free_memory()
    return weights


def _batches(
    dataset: Samples, objective: Objective, config: TrainConfig, seed: int, first_step: int, accelerator: Accelerator
) -> Iterator[Batch]:
    rank, world = accelerator.process_index, accelerator.num_processes
    loader = DataLoader(
        cast(Dataset, dataset),
        batch_sampler=StepBatches(
            len(dataset), config, seed, first_step, rank, world, lambda step: len(objective.updates(step))
        ),
        collate_fn=getattr(dataset, "collate", None),
        num_workers=config.workers,
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),  # its own, so that workers never draw from the global one
        pin_memory=accelerator.device.type == "cuda",
    )
    for batch in loader:
        yield {k: v.to(accelerator.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def check_limits(objective: Objective, values: Mapping[str, float], folder: Path, step: int) -> None:
    """FloatingPointError where a metric is beyond what the objective calls a training that goes on."""
    for name, (low, high) in objective.requires.limits.items():
        if name in values and not low <= values[name] <= high:
            raise FloatingPointError(
                f"stage {folder.name!r} diverged by step {step}: {name}={values[name]:.3g} is not within {low:g} and "
                f"{high:g}; lower train.learning_rate under another name=. The last good checkpoint is in "
                f"{folder / 'checkpoints'}"
            )


def _stop_at(step: int, dataset: Samples, objective: Objective, config: TrainConfig, run: Run, stage: str) -> None:
    """Keeps this rank's samples of a step whose loss or gradient is not finite, and raises FloatingPointError."""
    accelerator, folder = run.accelerator, run.path / stage
    rank = accelerator.process_index
    only = replace(config, steps=step + 1)
    place = seed_of(run.seed, stage), step, rank, accelerator.num_processes
    samples = list(StepBatches(len(dataset), only, *place, lambda step: len(objective.updates(step))))
    collate = getattr(dataset, "collate", default_collate)
    getting = getattr(dataset, "__getitems__", lambda indices: [dataset[index] for index in indices])
    kept = folder / f"not-finite-step-{step + 1:08d}-rank-{rank}.pt"
    with unwritable(kept):
        torch.save({"samples": samples, "batches": [collate(getting(indices)) for indices in samples]}, kept)
    raise FloatingPointError(
        f"the loss or the gradient of stage {stage!r} is not finite at step {step + 1}; look at its samples, kept in "
        f"{kept}, or lower train.learning_rate under another name=. The last good checkpoint is in "
        f"{folder / 'checkpoints'}"
    )
