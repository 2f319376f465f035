"""Networks that predict the variance of a sampler's step, too (models/families/deepfloyd): their students keep it.

Objectives see the first half of an output alone, in which they teach steps, guidance or the absence of blocks. Whatever
the objective, the second half learns, by the squared error, what the teacher predicts where the student was asked. That
serves any number of steps: it says where between two bounds the variance lies, and these are a step's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimstep.engine.objective import STUDENT, Batch, Metrics, Objective, ObjectiveAround, PlainObjective
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import Denoiser
from slimstep.models.family import denoiser_of, with_variance


@dataclass(eq=False)
class VarianceRecorder:
    """A denoiser that gives the first half of predictions, and notes the inputs and the second half of those of
    `student` that have gradients. `both` gives both halves."""

    both: Denoiser
    student: nn.Module | None = None
    calls: list[tuple[tuple[Tensor, Tensor, Conditioning], Tensor]] = field(default_factory=list)

    @property
    def prediction_type(self) -> str:
        return self.both.prediction_type

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.both.sample_shape

    def __call__(self, network: nn.Module, x_t: Tensor, t_B: Tensor, cond: Conditioning, **options: Any) -> Tensor:
        pred, variance = self.both(network, x_t, t_B, cond, **options).chunk(2, dim=1)
        if network is self.student and torch.is_grad_enabled():
            self.calls.append(((x_t.detach(), t_B, cond), variance))
        return pred

    def rescaled(self, guided: Tensor, plain: Tensor) -> Tensor:
        return guided

    def example(self, network: nn.Module, batch: int, **options: Any) -> tuple[Tensor, Tensor, Conditioning]:
        return self.both.example(network, batch, **options)


def recorder_of(network: nn.Module, prediction_type: str) -> VarianceRecorder | None:
    """None of a network that predicts no variance."""
    both = with_variance(denoiser_of(network, prediction_type))
    return both and VarianceRecorder(both)


class VarianceKept(ObjectiveAround):
    """An objective whose student also learns the variance that `teacher` predicts; the objective calls networks by
    `recorder`."""

    def __init__(self, objective: Objective | PlainObjective, recorder: VarianceRecorder, teacher: nn.Module):
        super().__init__(objective)
        self.recorder, self.teacher = recorder, teacher

    def loss(
        self, networks: Mapping[str, nn.Module], batch: Batch, generator: torch.Generator, update: str
    ) -> tuple[Tensor, Metrics]:
        if update != STUDENT:
            return self.objective.loss(networks, batch, generator, update)
        recorder, recorder.student = self.recorder, networks[STUDENT]
        try:
            loss, metrics = self.objective.loss(networks, batch, generator, update)
            errors = []
            for inputs, variance in recorder.calls:
                with torch.no_grad():
                    of_teacher = recorder.both(self.teacher, *inputs).chunk(2, dim=1)[1]
                errors.append(nn.functional.mse_loss(variance, of_teacher))
        finally:
            recorder.calls.clear()
            recorder.student = None
        assert errors, f"{type(self.objective).__name__} calls its student by no denoiser"
        error = torch.stack(errors).mean()
        return loss + error, {**metrics, "variance": error}
