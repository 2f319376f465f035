"""Setups: what cannot be says why, what can leaves the image as it was."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile
from torchvision.transforms.functional import pil_to_tensor

from slimstep.eval.sampling import Sampler
from slimstep.eval.timing.capture import CapturedSampler
from slimstep.eval.timing.inference import (
    CannotRunError,
    InferenceConfig,
    check_runs,
    combinations,
    running,
    use_kernel,
)
from slimstep.eval.timing.speed import TimedPipeline
from slimstep.models.pipeline import load_pipeline

CPU = torch.device("cpu")
PROMPTS = ["a cat", "two dogs", "a red tree"]


def timed(folder, batch=1, steps=3, **inference):
    return TimedPipeline(load_pipeline(folder), InferenceConfig(**inference), PROMPTS, steps, 2.5, CPU, batch)


@pytest.mark.parametrize("wrong", [{"compile": "fast"}, {"attention": "flsh"}, {"dtype": "int4"},
                                   {"memory_format": "nhwc"}, {"quantize": "int4"}])  # fmt: skip
def test_a_setup_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong)))):
        InferenceConfig(**wrong)


@pytest.mark.parametrize("inference", [{"dtype": "tf32"}, {"compile": "reduce-overhead"}, {"compile": "cudagraphs"},
                                   {"attention": "cudnn"}, {"attention": "efficient"}, {"quantize": "fp8"},
                                   {"capture": True}])  # fmt: skip
def test_what_needs_a_gpu_says_so_on_a_cpu(inference):
    with pytest.raises(CannotRunError, match="CUDA"):
        check_runs(InferenceConfig(**inference), CPU)


@pytest.mark.parametrize("inference", [{"fused_qkv": True, "attention": "vanilla"},
                                   {"capture": True, "compile": "max-autotune"}])  # fmt: skip
def test_what_does_not_go_together_says_so(inference):
    with pytest.raises(CannotRunError, match="vanilla|one CUDA graph"):
        check_runs(InferenceConfig(**inference), CPU)


def test_combinations_are_all_there_once():
    configs = combinations(dtype=["float32", "bfloat16"], attention=["sdpa", "vanilla", "math"])
    assert (
        len(set(configs))
        == len({inference.key for inference in configs})
        == len({str(inference) for inference in configs})
        == 6
    )


@pytest.mark.parametrize("inference", [{"attention": "vanilla"}, {"attention": "math"}, {"attention": "flash"},
                                   {"memory_format": "channels_last"}, {"fused_qkv": True}])  # fmt: skip
def test_a_setup_in_float32_leaves_the_images(tiny_pipeline_folder, inference):
    plain, other = (timed(tiny_pipeline_folder, **kind).images(2).int() for kind in ({}, inference))
    assert (plain - other).abs().max() <= 1  # one step of 255, where rounding goes the other way


def test_a_setup_reaches_the_networks(tiny_pipeline_folder):
    bfloat16 = timed(tiny_pipeline_folder, dtype="bfloat16", memory_format="channels_last", attention="vanilla")
    assert {p.dtype for p in bfloat16.pipeline.unet.parameters()} == {torch.bfloat16}
    assert bfloat16.pipeline.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert {type(p).__name__ for p in bfloat16.pipeline.unet.attn_processors.values()} == {"AttnProcessor"}
    fused = timed(tiny_pipeline_folder, fused_qkv=True)
    assert {type(p).__name__ for p in fused.pipeline.unet.attn_processors.values()} == {"FusedAttnProcessor2_0"}


class Attending(nn.Module):
    def forward(self, q):
        return nn.functional.scaled_dot_product_attention(q, q, q)


def test_a_kernel_is_that_of_its_network_alone():
    q, limited = torch.randn(1, 2, 8, 16), Attending()
    use_kernel(limited, SDPBackend.CUDNN_ATTENTION)
    with pytest.raises(RuntimeError, match="kernel"):
        limited(q)
    Attending()(q)


@pytest.mark.slow
def test_a_compiled_network_calls_the_kernel_that_was_asked_for():
    """Dynamo guards no choice of kernel, and its caches keep none: the graph itself has to hold it."""
    q, used = torch.randn(1, 2, 64, 32), {}
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        network = Attending()
        use_kernel(network, kernel)
        torch.compiler.reset()
        compiled = torch.compile(network, fullgraph=True)
        with torch.inference_mode():
            compiled(q)
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                compiled(q)
        used[kernel] = {event.key for event in profiled.key_averages()}
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert flash in used[SDPBackend.FLASH_ATTENTION] and flash not in used[SDPBackend.MATH]


def test_what_is_global_is_put_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with running(InferenceConfig(dtype="tf32")):
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    with running(InferenceConfig()):
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_int8_stays_near_float32(tiny_pipeline_folder):
    pytest.importorskip("torchao")
    plain, int8 = (timed(tiny_pipeline_folder, quantize=kind) for kind in ("none", "int8"))
    names = [type(m.weight).__name__ for n, m in int8.pipeline.unet.named_modules()
             if isinstance(m, torch.nn.Linear) and "transformer_blocks" in n]  # fmt: skip
    assert names and "Parameter" not in names
    assert (plain.images(2).float() - int8.images(2).float()).abs().mean() < 8


def test_the_timed_images_are_those_of_the_sampler(tiny_pipeline_folder):
    drawn = timed(tiny_pipeline_folder, batch=2).images(3)
    pipeline = load_pipeline(tiny_pipeline_folder)
    expected = Sampler(pipeline, 3, 2.5).images(pipeline.unet, PROMPTS, range(3))
    assert (drawn.int() - expected.int()).abs().max() <= 1


@pytest.mark.gpu
def test_a_captured_loop_draws_what_the_eager_one_draws(tiny_pipeline_folder):
    pipeline = load_pipeline(tiny_pipeline_folder).to("cuda")
    sampler, captured = Sampler(pipeline, 3, 2.5), CapturedSampler(Sampler(pipeline, 3, 2.5))
    for prompts in (PROMPTS[:2], PROMPTS[1:]):  # the second is a replay with other inputs
        noise = torch.stack([sampler.noise(i) for i in range(2)])
        expected = sampler.decode(sampler.latents(pipeline.unet, sampler.encode(prompts), noise)).cpu()
        drawn = torch.stack([pil_to_tensor(image) for image in captured.draw(prompts, noise)])
        assert (drawn.int() - expected.int()).abs().max() <= 1
