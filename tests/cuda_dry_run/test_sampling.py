"""Sampling on a device that is not there: no step waits, and scores wait once a batch."""

import pytest
import torch

from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.sampling import Sampler
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.schedulers import swapped_scheduler
from tests.tiny import slow, small_pipeline, tiny_sdxl_pipeline


def waits_of(gpu, scheduler, steps, make=small_pipeline):
    pipeline = make().to("cuda", torch.bfloat16)
    pipeline.scheduler = swapped_scheduler(pipeline.scheduler, scheduler)
    sampler, unet = Sampler(pipeline, steps, 2.5), PrunableUNet2DConditionModel.from_unet(pipeline.unet)
    with gpu.counted() as waits:
        images = sampler.images(unet, ["a", "b"], [0, 1])
    assert images.device.type == "cuda" and images.dtype == torch.uint8
    return waits


@pytest.mark.parametrize("scheduler", ["ddim", "heun", *slow("euler", "dpmsolver++", "pndm")])
def test_no_step_of_sampling_waits(gpu, scheduler):
    assert waits_of(gpu, scheduler, 3) == waits_of(gpu, scheduler, 1)


@pytest.mark.slow
def test_no_step_of_an_sdxl_waits(gpu):
    assert waits_of(gpu, "euler", 3, tiny_sdxl_pipeline) == waits_of(gpu, "euler", 1, tiny_sdxl_pipeline)


def test_a_scheduler_that_draws_noise_waits_for_it_and_is_seen(gpu):
    more = waits_of(gpu, "euler_a", 3) - waits_of(gpu, "euler_a", 1)
    assert set(more.values()) == {2}


def test_a_batch_of_images_is_scored_with_as_many_waits_as_an_image(gpu, tiny_clip_folder):
    scorer = ClipScorer(f"local-dir:{tiny_clip_folder}", device="cuda")
    counts = []
    for rows in (1, 5):
        images, text = torch.zeros(rows, 3, 16, 16, dtype=torch.uint8, device="cuda"), scorer.text(["a"] * rows)
        with gpu.counted() as waits:
            assert scorer.score(images, text).shape == (rows,)
        counts.append(waits)
    assert counts[0] == counts[1]
