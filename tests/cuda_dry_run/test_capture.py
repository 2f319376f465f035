"""A captured loop: the graph of a scheduler that stays on the device, and a reason for one that does not."""

import pytest
import torch

from slimstep.eval.timing.setups import CannotRunError, Setup
from slimstep.eval.timing.speed import Subject
from slimstep.models.schedulers import swapped_scheduler
from tests.cuda_dry_run.conftest import small_pipeline


def captured(scheduler):
    pipeline = small_pipeline()
    pipeline.scheduler = swapped_scheduler(pipeline.scheduler, scheduler)
    setup = Setup(dtype="bfloat16", capture=True)
    return Subject(pipeline, setup, ["a", "b"], 2, 2.5, torch.device("cuda"))


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++", "euler"])
def test_a_scheduler_that_stays_on_the_device_is_captured_once(gpu, scheduler):
    subject = captured(scheduler)
    subject.call()
    graph = subject.captured.graph
    subject.call()
    assert subject.captured.graph is graph


@pytest.mark.parametrize("scheduler", ["lcm", "unipc", "euler_a", "ddpm", "dpm2_a"])
def test_a_scheduler_that_copies_in_its_steps_is_refused_before_the_capture(gpu, scheduler):
    subject = captured(scheduler)
    with pytest.raises(CannotRunError, match="Scheduler cannot be one CUDA graph.*synchronizing"):
        subject.call()
    assert subject.captured.graph is None and torch.cuda.get_sync_debug_mode() == 0
    with pytest.raises(CannotRunError):
        subject.call()  # and again: nothing is left of the first attempt
