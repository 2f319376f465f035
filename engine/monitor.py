"""What is seen of a student while it is trained: a monitor's metrics in the log, and the weights that it finds best."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from slimstep.engine.config import TrainConfig
from slimstep.engine.ema import DeviceEMA
from slimstep.engine.files import load_json, write_json, write_tensors
from slimstep.engine.run import Run
from slimstep.engine.trained import TrainedNetwork

BEST, BEST_WEIGHTS = "best.json", "best.safetensors"


class Monitor(Protocol):
    """Looks at the student, in eval mode and with its EMA weights, after so many steps; all processes call it. It gives
    metrics, of which the higher `best_by` is, the better the student; None where nothing can be said."""

    best_by: str | None

    def __call__(self, student: nn.Module, step: int) -> Mapping[str, float]: ...


@dataclass(eq=False)
class Watch:
    """A monitor at work in a stage. A continued run sees again what an uninterrupted one sees, and so keeps the same
    best weights."""

    monitor: Monitor
    run: Run
    stage: str
    config: TrainConfig

    @property
    def folder(self) -> Path:
        return self.run.path / self.stage

    def look(self, student: TrainedNetwork, ema: DeviceEMA | None, step: int) -> None:
        network = student.network
        if ema:
            ema.store(student.parameters)
            ema.copy_to(student.parameters)
        values = self.monitor(network.eval(), step)
        self.run.log(self.stage, step, {f"calibration/{name}": value for name, value in values.items()})
        if self.config.keep_best:
            self.keep(network, values[str(self.monitor.best_by)], step)
        network.train()
        if ema:
            ema.restore(student.parameters)

    def keep(self, network: nn.Module, value: float, step: int) -> None:
        """The weights, and after them what they reached, where nothing better is there."""
        best = load_json(self.folder / BEST)["value"] if (self.folder / BEST).exists() else -torch.inf
        if self.run.accelerator.is_main_process and value > best:
            write_tensors(self.folder / BEST_WEIGHTS, network.state_dict())
            write_json(self.folder / BEST, {"step": step, "value": value, "metric": self.monitor.best_by})
        self.run.accelerator.wait_for_everyone()

    def restore_best(self, student: TrainedNetwork) -> None:
        device = next(student.network.parameters()).device
        student.network.load_state_dict(load_file(self.folder / BEST_WEIGHTS, device=str(device)))
