"""The one training loop. A job supplies an objective; the loop owns the optimiser, EMA, logging and checkpoints.

Nothing random is remembered. Micro-batch g of step s (g counts all processes and accumulation steps) takes the
samples at a fixed place of a fixed order, and draws from a generator seeded by (seed, stage, s, g): a continued run
repeats what an uninterrupted one does, and two processes do what one does with twice the accumulation.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Iterator

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from slimstep.engine.averages import DeviceEMA
from slimstep.engine.checkpoints import Checkpoints
from slimstep.engine.config import TrainConfig
from slimstep.engine.files import damaged, unwritable, write_tensors
from slimstep.engine.objective import Batch, Metrics, PlainObjective
from slimstep.engine.optimizers import make_optimizer, set_learning_rate
from slimstep.engine.preemption import NotedSignals, leave_signals_to_the_parent
from slimstep.engine.progress import progress
from slimstep.engine.run import Run
from slimstep.engine.seeding import generator, seed_of
from slimstep.engine.sharding import as_number, copy_to_shard, is_sharded, tell_deepspeed, whole_weights, with_room

WEIGHTS = "weights.safetensors"


class StepBatches(Sampler[list[int]]):
    """This rank's index lists from `first_step` on: a function of (seed, step, micro-step, rank) alone."""

    def __init__(self, size: int, config: TrainConfig, seed: int, first_step: int, rank: int, world: int):
        self.size, self.config, self.seed, self.first_step, self.rank, self.world = (
            size, config, seed, first_step, rank, world)  # fmt: skip
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
        self.counts: dict[str, int] = {}
        self.finite: list[Tensor] = []  # per step: whether its loss and gradient were finite on this rank

    def add(self, metrics: Metrics) -> None:
        """Sums on the device: no host synchronisation per step."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def end_step(self, grad_norm: Tensor | None) -> None:
        """Closes a step; `grad_norm` None where a gradient that overflows is no fault (float16's loss scaling)."""
        checked = [self.sums["loss"]]
        if grad_norm is not None:
            self.add({"grad_norm": grad_norm})
            checked.append(self.sums["grad_norm"])
        self.finite.append(torch.stack(checked).isfinite().all())

    def take(self, accelerator) -> tuple[dict[str, float], int | None]:
        """The means since the last call over all processes, and a new start.

        Beside them which of the steps, counted from 0, was the first that was not finite on this rank, if one was.
        """
        names = sorted(self.sums)
        means = torch.stack([self.sums[name] / self.counts[name] for name in names])
        values = accelerator.reduce(means, "mean").tolist()
        bad = (~torch.stack(self.finite)).nonzero().flatten().tolist()
        self.sums, self.counts, self.finite = {}, {}, []
        return dict(zip(names, values, strict=True)), bad[0] if bad else None


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
    model: nn.Module, objective: PlainObjective, dataset: Dataset, config: TrainConfig, run: Run, stage: str
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
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    folder.mkdir(parents=True, exist_ok=True)
    sharded = is_sharded(run.accelerator)
    student = copy_to_shard(model, run.accelerator) if sharded else model
    with NotedSignals() as signals:
        weights = _run_steps(student.train(), objective, dataset, config, run, stage, signals)
        if run.accelerator.is_main_process:
            write_tensors(folder / WEIGHTS, weights)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        run.accelerator.wait_for_everyone()
    if sharded:
        load_trained(with_room(model, run.accelerator.device), run, stage)
    if config.compile:
        torch.compiler.reset()  # dynamo keeps eight graphs of a forward, whosever it is: the next stage wants its own
    if config.gradient_checkpointing:
        model.disable_gradient_checkpointing()
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
    model: nn.Module,
    objective: PlainObjective,
    dataset: Dataset,
    config: TrainConfig,
    run: Run,
    stage: str,
    signals: NotedSignals,
) -> dict[str, Tensor]:
    """Trains `model` in place; its finished weights, whole, on rank 0 at least."""
    accelerator = run.accelerator
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], config)
    wrapped = torch.compile(model, dynamic=False) if config.compile else model
    tell_deepspeed(accelerator, config)
    wrapped, optimizer = accelerator.prepare(wrapped, optimizer)
    parameters = [p for p in wrapped.parameters() if p.requires_grad]  # sharding makes new ones
    ema = DeviceEMA(parameters, decay=config.ema_decay) if config.ema_decay else None
    means = RunningMeans()
    checkpoints = Checkpoints(run.path / stage / "checkpoints", config.keep_checkpoints, accelerator, ema)
    first_step = checkpoints.load_newest(run.agreed)
    run.rewind(stage, first_step)
    seed = seed_of(run.seed, stage)
    batches = _batches(dataset, config, seed, first_step, accelerator)
    speedometer = Speedometer(config.batch_size * config.accumulation * accelerator.num_processes, first_step)
    quiet = not accelerator.is_main_process
    bar = progress(total=config.steps, initial=first_step, desc=stage, unit="step", disable=quiet)
    logged = first_step
    for step in range(first_step, config.steps):
        set_learning_rate(optimizer, learning_rate_at(step, config))
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
        grad_norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
        means.end_step(None if accelerator.scaler else as_number(grad_norm, accelerator))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.step(parameters)
        bar.update()
        done = step + 1
        saving = done % config.checkpoint_every == 0 and done < config.steps
        if saving or done % config.log_every == 0 or done == config.steps:
            came = signals.on_any_rank(accelerator) if done < config.steps else []
            values, bad = means.take(accelerator)
            if bad is not None:
                _stop_at(logged + bad, dataset, config, run, stage)
            logged = done
            speed = speedometer.samples_per_second(done)
            rates = {"samples_per_second": speed}
            run.log(stage, done, {**values, "lr": learning_rate_at(step, config)}, rates, tracked=not came)
            bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            if saving or came:
                checkpoints.save(done)
            if came:
                signals.take_course(came)
    bar.close()
    if ema:
        ema.copy_to(parameters)
    # Without accelerate's autocast around it: a network just trained and one read from its file compute alike.
    # Accelerate wraps the compiled one, which is let go: unwrapping DDP would leave it, and its names of weights.
    bare = model if config.compile else accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    vars(model).pop("_original_forward", None)
    weights = whole_weights(bare, accelerator)
    accelerator.free_memory()
    return weights


def _batches(dataset: Dataset, config: TrainConfig, seed: int, first_step: int, accelerator) -> Iterator[Batch]:
    rank, world = accelerator.process_index, accelerator.num_processes
    loader = DataLoader(
        dataset,
        batch_sampler=StepBatches(len(dataset), config, seed, first_step, rank, world),
        collate_fn=getattr(dataset, "collate", None),
        num_workers=config.workers,
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),  # its own, so that workers never draw from the global one
        pin_memory=accelerator.device.type == "cuda",
    )
    for batch in loader:
        yield {k: v.to(accelerator.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def _stop_at(step: int, dataset: Dataset, config: TrainConfig, run: Run, stage: str) -> None:
    """Keeps this rank's samples of a step whose loss or gradient is not finite, and raises FloatingPointError."""
    accelerator, folder = run.accelerator, run.path / stage
    rank = accelerator.process_index
    batches = iter(StepBatches(len(dataset), config, seed_of(run.seed, stage), step, rank, accelerator.num_processes))
    samples = [next(batches) for _ in range(config.accumulation)]
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
