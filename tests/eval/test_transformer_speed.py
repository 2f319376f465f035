"""Timing pipelines of transformers: what is timed is what the sampler draws, by whichever attention kernel is there."""

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch.nn.attention import flex_attention

from scripts.random_transformers import (
    small_flux_pipeline,
    small_pixart_pipeline,
    small_qwen_image_pipeline,
    small_sana_pipeline,
    small_sd3_pipeline,
)
from slimstep.eval.timing.inference import CannotRunError, InferenceConfig
from slimstep.eval.timing.speed import TimedPipeline
from slimstep.eval.timing.stage_timer import timed_components
from slimstep.eval.timing.tasks import task_pipeline
from slimstep.models.networks import with_sequence_length
from slimstep.models.sizes import settle_sizes
from tests.tiny import small_pipeline

CPU = torch.device("cpu")
MAKE = {"SD3": small_sd3_pipeline, "PixArt": small_pixart_pipeline, "FLUX": small_flux_pipeline,
        "Sana": small_sana_pipeline, "Qwen-Image": small_qwen_image_pipeline}  # fmt: skip


def timed(pipeline, inference=None, guidance=1.0, **kwargs):
    inference = inference or InferenceConfig()
    return TimedPipeline(pipeline, inference, ["a b", "c"], 2, guidance, CPU, 2, kwargs=kwargs)


@pytest.mark.parametrize("family", MAKE)
def test_what_is_timed_is_what_is_sampled(family):
    pipeline = MAKE[family]()
    settle_sizes(pipeline)  # as load_pipeline does
    one = timed(with_sequence_length(pipeline, 8), guidance=1.0 if family == "FLUX" else 3.0)
    with timed_components(one.pipeline, CPU) as timer:
        images = one.images(2)
    assert [part for part, _ in timer.marks].count("UNet") in (2, 4)  # Qwen-Image runs it twice a step
    assert sum(part == "text encoder" for part, _ in timer.marks) >= 1
    drawn = one.sampler.images(pipeline.transformer, one.prompts, [0, 1])
    assert (images.int() - drawn.int()).abs().max() <= 1


@pytest.mark.parametrize("kernel", ["math", "flash"])
def test_kernels_of_torch_draw_the_same(kernel):
    plain, limited = (timed(small_sd3_pipeline(), InferenceConfig(attention=name)) for name in ("sdpa", kernel))
    assert (plain.images(2).int() - limited.images(2).int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("make", "attention", "why"),
    [
        (small_sd3_pipeline, "vanilla", "diffusers has no vanilla attention for SD3Transformer2DModel"),
        (small_sd3_pipeline, "flex", "diffusers sends no attention of SD3Transformer2DModel through its dispatcher"),
        (small_flux_pipeline, "flash_attn", "flash_attn is not installed: pip install flash-attn"),
        (small_flux_pipeline, "sageattention", "sageattention is not installed"),
        (small_qwen_image_pipeline, "xformers", "xformers is not installed: pip install xformers"),
        (small_pipeline, "xformers", "xformers is not installed: pip install xformers"),
        (small_pipeline, "flash_attn", "diffusers sends no attention of UNet2DConditionModel through its dispatcher"),
    ],
)
def test_a_kernel_that_is_not_there_says_why(monkeypatch, make, attention, why):
    monkeypatch.setattr("slimstep.eval.timing.inference.find_spec", lambda name: None)
    with pytest.raises(CannotRunError, match=why):
        timed(make(), InferenceConfig(attention=attention))


def test_xformers_takes_the_place_of_no_linear_attention(monkeypatch):
    monkeypatch.setattr("slimstep.eval.timing.inference.find_spec", lambda name: object())
    with pytest.raises(CannotRunError, match="none of SanaTransformer2DModel's .'SanaAttnProcessor2_0', 'SanaLinear"):
        timed(small_sana_pipeline(), InferenceConfig(attention="xformers"))


@pytest.mark.parametrize("family", MAKE)
def test_fused_projections_draw_the_same_or_say_that_there_are_none(family):
    pipeline, inference = MAKE[family](), InferenceConfig(fused_qkv=True)
    settle_sizes(pipeline)
    if family in ("Sana", "Qwen-Image"):
        with pytest.raises(CannotRunError, match="diffusers fuses no QKV of .*Transformer2DModel"):
            timed(pipeline, inference)
    else:
        plain = timed(pipeline).images(2)
        assert (plain.int() - timed(pipeline, inference).images(2).int()).abs().max() <= 1


def test_a_kernel_of_one_network_is_that_of_no_other(monkeypatch):
    """diffusers' set_attention_backend makes it the kernel of every network without one of its own."""
    pipelines = small_flux_pipeline(), small_flux_pipeline()
    for pipeline in pipelines:
        settle_sizes(pipeline)
    by_flex, plain = timed(pipelines[0], InferenceConfig(attention="flex")), timed(pipelines[1])
    called, flex = [], flex_attention.flex_attention
    monkeypatch.setattr(flex_attention, "flex_attention", lambda *a, **k: called.append(1) or flex(*a, **k))
    images = plain.images(2)
    assert not called
    assert (images.int() - by_flex.images(2).int()).abs().max() <= 1 and called


def test_a_kernel_goes_through_diffusers_dispatcher():
    one = timed(small_flux_pipeline(), InferenceConfig(attention="flex"))
    chosen = {str(module.processor._attention_backend) for module in one.pipeline.transformer.modules()
              if hasattr(module, "processor")}  # fmt: skip
    assert len(chosen) == 1 and "flex" in chosen.pop().lower()
    now, _ = _AttentionBackendRegistry.get_active_backend()
    assert "flex" not in str(now).lower(), "the next row has another kernel"


def test_tasks_that_diffusers_has_for_a_transformer():
    settle_sizes(flux := small_flux_pipeline())
    pipeline, kwargs = task_pipeline(with_sequence_length(small_sd3_pipeline(), 8), "img2img", 2)
    assert timed(pipeline, guidance=3.0, **kwargs).images(2).shape == (2, 3, 16, 16)
    with pytest.raises(CannotRunError, match="diffusers has no img2img of a PixArtSigmaPipeline"):
        task_pipeline(small_pixart_pipeline(), "img2img", 1)
    with pytest.raises(CannotRunError, match="random ControlNets .* not for a FluxPipeline"):
        task_pipeline(flux, "controlnet", 1)
