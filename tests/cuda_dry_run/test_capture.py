"""The loop as one CUDA graph: the graph of a scheduler that stays on the device, and a reason for one that does not."""

import pytest
import torch

from slimstep.eval.timing.inference import CannotRunError, InferenceConfig
from slimstep.eval.timing.speed import TimedPipeline
from slimstep.models.schedulers import swapped_scheduler
from tests.tiny import slow, small_pipeline


def captured(scheduler):
    pipeline = small_pipeline()
    pipeline.scheduler = swapped_scheduler(pipeline.scheduler, scheduler)
    inference = InferenceConfig(dtype="bfloat16", capture=True)
    return TimedPipeline(pipeline, inference, ["a", "b"], 2, 2.5, torch.device("cuda"))


@pytest.mark.parametrize("scheduler", ["ddim", *slow("dpmsolver++", "euler")])
def test_a_scheduler_that_stays_on_the_device_is_captured_once(gpu, scheduler):
    timed = captured(scheduler)
    timed.call()
    graph = timed.captured.graph
    timed.call()
    assert timed.captured.graph is graph


@pytest.mark.parametrize("scheduler", ["euler_a", *slow("lcm", "unipc", "ddpm", "dpm2_a")])
def test_a_scheduler_that_copies_in_its_steps_is_refused_before_the_capture(gpu, scheduler):
    timed = captured(scheduler)
    with pytest.raises(CannotRunError, match="Scheduler cannot be one CUDA graph.*synchronizing"):
        timed.call()
    assert timed.captured.graph is None and torch.cuda.get_sync_debug_mode() == 0
    with pytest.raises(CannotRunError):
        timed.call()  # and again: nothing is left of the first attempt
