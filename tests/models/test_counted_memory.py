"""What is counted of memory, from configurations alone, is what real tensors take and the allocator gives out.

In half precision the allocator is not asked: what it gives for copies that kernels of bfloat16 reorder is a CPU's own
(up to a quarter of these small networks' need).
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers import ModelMixin, UNetSpatioTemporalConditionModel
from torch.profiler import ProfilerActivity, profile

from scripts.random_transformers import small_cogvideox, small_cogvideox_pipeline, small_wan
from slimstep.eval.memory_plan import MemoryNeed
from slimstep.models.decoding import decoded_images
from slimstep.models.families.svd.network import PrunableUNetSpatioTemporalConditionModel
from slimstep.models.families.transformer.networks.cogvideox import PrunableCogVideoXTransformer3DModel
from slimstep.models.families.transformer.networks.wan import PrunableWanTransformer3DModel
from slimstep.models.family import denoiser_of
from slimstep.models.memory import Living, decoding_bytes, evaluation_bytes, forget_gradient, training_need

TOKENS = 20


def small_svd() -> ModelMixin:
    torch.manual_seed(0)
    return PrunableUNetSpatioTemporalConditionModel.from_unet(UNetSpatioTemporalConditionModel(
        sample_size=16, in_channels=8, out_channels=4, block_out_channels=(32,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",), up_block_types=("CrossAttnUpBlockSpatioTemporal",),
        cross_attention_dim=16, num_attention_heads=2, addition_time_embed_dim=8, num_frames=5,
        projection_class_embeddings_input_dim=24,
    ))  # fmt: skip


def large(network: ModelMixin) -> ModelMixin:
    """Drawing enough for activations to count beside the random states that checkpoints keep on a CPU."""
    network.register_to_config(sample_size=[16, 24], sample_frames=17)
    return network


NETWORKS = {
    "SVD": small_svd,
    "CogVideoX": lambda: large(PrunableCogVideoXTransformer3DModel.from_unet(
        small_cogvideox(use_rotary_positional_embeddings=True))),
    "Wan": lambda: large(PrunableWanTransformer3DModel.from_unet(small_wan())),
}  # fmt: skip


def measured(work: Callable[[], None]) -> int:
    """The most bytes that the CPU's allocator had given out at once while it worked."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    now, peak = 0, 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("name", "checkpointing", "is_half"),
    [("SVD", True, False), ("SVD", True, True), ("CogVideoX", False, False), ("CogVideoX", False, True),
     ("CogVideoX", True, True), ("Wan", True, False), ("Wan", True, True)],
)  # fmt: skip
def test_what_is_counted_of_a_training_step_is_what_it_takes(name, checkpointing, is_half):
    network = NETWORKS[name]().train()
    denoiser = denoiser_of(network)
    inputs = denoiser.example(network, 1, tokens=TOKENS)
    if checkpointing:
        network.enable_gradient_checkpointing()
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(forget_gradient)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            loss = denoiser(network, *inputs).float().square().mean()
        loss.backward()

    counted = MemoryNeed(
        parameters=network.num_parameters(), sample=partial(training_need, network, TOKENS), batch=1,
        optimizer="adamw", has_ema=True, checkpointing=checkpointing, is_half=is_half,
    ).running  # fmt: skip
    with Living(network.parameters()) as living:
        step()
    assert counted == pytest.approx(living.peak, rel=0.02)
    if not is_half:
        assert counted == pytest.approx(measured(step), rel=0.02)


def test_checkpointing_needs_less_and_more_frames_more():
    network = NETWORKS["CogVideoX"]()
    plain, checkpointed = training_need(network, TOKENS), training_need(network, TOKENS, checkpointing=True)
    fewer = training_need(network, TOKENS, checkpointing=True, sample_frames=9)
    assert fewer.step < checkpointed.step < plain.step / 2
    assert evaluation_bytes(network, TOKENS) < checkpointed.forward


def test_what_is_counted_of_evaluating_and_decoding_is_what_it_takes():
    network, vae, shape = NETWORKS["CogVideoX"](), small_cogvideox_pipeline().vae, (4, 1, 11, 9)
    vae = type(vae).from_config({**vae.config, "sample_height": 48, "sample_width": 40})  # whose tiles fit together
    denoiser = denoiser_of(network)
    inputs = denoiser.example(network, 1, tokens=TOKENS)
    with torch.no_grad():
        evaluation = measured(lambda: denoiser(network, *inputs))
    assert evaluation_bytes(network, TOKENS) == pytest.approx(evaluation, rel=0.1)
    for is_tiled in (False, True):  # with real tensors: a CPU's convolutions have columns of their own inside
        vae.use_tiling = is_tiled
        with torch.no_grad(), Living(vae.parameters()) as living:
            decoded_images(vae, torch.randn(1, *shape))
        assert decoding_bytes(vae, shape, is_tiled) == living.peak
    assert decoding_bytes(vae, shape, is_tiled=True) < decoding_bytes(vae, shape)
