"""A stage of training within a job: its objective, its data, and where frozen networks lie meanwhile."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn
from torch.utils.data import Dataset

from slimstep.data.shards import CachedPairs
from slimstep.engine.components import check
from slimstep.engine.config import TrainConfig
from slimstep.engine.loop import load_trained, train, trained
from slimstep.engine.monitor import Monitor
from slimstep.engine.objective import Objective, check_requirements, requirements
from slimstep.eval.inputs import Teacher
from slimstep.eval.refinement import OfPictures
from slimstep.eval.variance import VarianceKept, recorder_of
from slimstep.models.conditioning import Conditioning
from slimstep.models.families.deepfloyd.cascade import first_stage_of, refines
from slimstep.models.family import denoiser_of
from slimstep.models.pipeline import on_device


def train_stage(
    unet: nn.Module,
    stage: str,
    description: Mapping[str, Any],
    config: TrainConfig,
    teacher: Teacher,
    pairs: Callable[[], CachedPairs],
    offloadable: Iterable[nn.Module],
    teaching: Callable[[], nn.Module] | None = None,
    samples: Callable[[Objective], Dataset] | None = None,
    monitor: Monitor | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The UNet, trained in place with the objective that is described; a finished stage makes no data and no objective.

    `teaching()` gives the network that the objective has as its teacher, by default the job's; of `offloadable` all
    others lie on the CPU, and the teacher, too, where its targets are cached. The UNet may lie on the CPU: it is on the
    device from the training on. `samples(objective)` gives what it learns from, by default the `pairs`; `monitor` looks
    at it meanwhile. `kwargs` are further arguments of the objective. A variance that the network predicts stays the
    teacher's (eval/variance.py).
    """
    if trained(teacher.run, stage):
        return load_trained(unet.to(teacher.device), teacher.run, stage)
    with offloaded(offloadable):  # before copies are made: the device never has a network twice
        taught_by = teaching() if teaching else compute_copy(teacher.unet, teacher)
        uncond = pairs().unconditional.to(teacher.device)
        recorder = recorder_of(teacher.unet, kwargs.get("schedule", teacher.schedule).prediction_type)
        own = {**kwargs, "denoiser": recorder} if recorder else kwargs
        objective = objective_of(description, teacher, taught_by, uncond, **own)
        if recorder:
            objective = VarianceKept(objective, recorder, taught_by)
        if refines(teacher.pipeline):
            objective = OfPictures(objective, teacher.pipeline)
        data = samples(objective) if samples else pairs()
        if requirements(objective).cached_targets and not recorder:
            taught_by.to("cpu")
        return train(unet.to(teacher.device), objective, data, config, teacher.run, stage, monitor)


@contextmanager
def offloaded(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Frozen networks on the CPU for a while: what trains needs the device more."""
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(on_device(network, "cpu"))
        yield


def compute_copy(network: nn.Module, teacher: Teacher) -> nn.Module:
    """A frozen network as mixed precision runs it: on the device, cast once and not at every evaluation.

    A copy, made on the CPU, unless the network is there in that dtype or is the job's own.
    """
    here = torch.empty(0, device=teacher.device).device  # "cuda" is a place only once it has a number
    if network.dtype == teacher.compute_dtype and (network is teacher.unet or network.device == here):
        return network.to(here)
    with on_device(network, "cpu"):
        copied = copy.deepcopy(network).to(teacher.compute_dtype)
    return copied.to(teacher.device)


def objective_of(
    description: Mapping[str, Any], job: Teacher, teacher: nn.Module, uncond: Conditioning, **kwargs: Any
) -> Objective:
    """An objective of networks that are called as the job's teacher, on its noise schedule where no other is given."""
    kwargs = {"schedule": job.schedule, "uncond": uncond, "teacher": teacher, **kwargs}
    denoiser = denoiser_of(job.unet, kwargs["schedule"].prediction_type)
    return make_objective(description, **{"denoiser": denoiser, **kwargs})


def make_objective(description: Mapping[str, Any], **kwargs: Any) -> Objective:
    """An objective of the loop from its `_target_`. ValueError where its arguments are not what the class takes."""
    try:
        return instantiate(description, _partial_=True, _convert_="all")(**kwargs)
    except (TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"objective {description['_target_']}: {type(error).__name__}: {error}") from error


def check_objective(
    key: str,
    description: Mapping[str, Any],
    training: TrainConfig,
    teacher: Teacher,
    is_monitored: bool = False,
    **kwargs: Any,
) -> Objective:
    """The objective under `key`, of no data. ValueError if it cannot be, or be trained in this way."""
    check(description, key)
    objective = objective_of(description, teacher, teacher.unet, Conditioning(), **kwargs)
    check_requirements(objective, training, teacher.run.accelerator, is_monitored)
    if refines(teacher.pipeline):
        first_stage_of(teacher.pipeline)  # ValueError for one without
        if requirements(objective).cached_targets:
            why = "a second stage's pictures are noised anew at every step"
            raise ValueError(f"{key}.cached_draws: {why}; set 0")
    return objective
