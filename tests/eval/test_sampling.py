"""Sampling inside the framework and sampling by a user are the same thing."""

from operator import attrgetter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from torch import nn
from torch._dynamo.testing import CompileCounter

from slimstep.data.encoding import encode_images
from slimstep.eval.sampling import Sampler
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.guidance import with_guidance_embedding
from tests.tiny import small_pipeline

PROMPTS = ("a red circle", "a blue square above a green star", "two yellow triangles", "a small red star")


def stock_images(pipeline, sampler: Sampler, indices) -> torch.Tensor:
    images = pipeline(
        prompt=[PROMPTS[i] for i in indices],
        latents=torch.stack([sampler.noise(i) for i in indices]),
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance_scale,
    ).images
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_images_are_those_of_the_stock_pipeline(prediction_type, guidance_scale):
    pipeline = small_pipeline(prediction_type)
    sampler = Sampler(pipeline, steps=4, guidance_scale=guidance_scale)
    images = sampler.images(pipeline.unet, PROMPTS, [0, 1, 2])
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 16, 16)
    assert images.float().std() > 5, "images without contrast would compare equal whatever made them"
    assert torch.equal(images, stock_images(pipeline, sampler, [0, 1, 2]))


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler])
def test_any_scheduler_of_the_pipeline_draws_as_in_the_pipeline(scheduler):
    pipeline = small_pipeline("epsilon")
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    sampler = Sampler(pipeline, steps=5, guidance_scale=2.0)
    first = sampler.images(pipeline.unet, PROMPTS, [2, 3])
    assert torch.equal(first, stock_images(pipeline, sampler, [2, 3]))
    again = sampler.images(pipeline.unet, PROMPTS, [2, 3])
    assert torch.equal(first, again), "a scheduler carried state between batches"


def test_a_guidance_distilled_unet_draws_as_in_the_pipeline():
    pipeline = small_pipeline("epsilon")
    torch.manual_seed(1)
    pipeline.unet = with_guidance_embedding(pipeline.unet, 32)
    torch.nn.init.normal_(pipeline.unet.time_embedding.cond_proj.weight)
    sampler, other = (Sampler(pipeline, steps=3, guidance_scale=w) for w in (3.0, 6.0))
    images = sampler.images(pipeline.unet, PROMPTS, [0, 1, 2])
    assert torch.equal(images, stock_images(pipeline, sampler, [0, 1, 2]))
    assert not torch.equal(images, other.images(pipeline.unet, PROMPTS, [0, 1, 2]))


def test_an_image_belongs_to_its_prompt_not_to_its_batch():
    pipeline = small_pipeline("epsilon")
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)  # draws noise at every step
    sampler = Sampler(pipeline, steps=3, guidance_scale=3.0)
    together = sampler.images(pipeline.unet, PROMPTS, [0, 1, 2, 3])
    alone = torch.cat([sampler.images(pipeline.unet, PROMPTS, [i]) for i in (0, 1, 2, 3)])
    assert (together.int() - alone.int()).abs().max() <= 1, "another batch size may change the last bit, no more"
    twins = sampler.images(pipeline.unet, PROMPTS, [1, 1])
    assert torch.equal(twins[0], twins[1])


def test_the_seed_and_the_index_make_the_noise():
    pipeline = small_pipeline("epsilon")
    sampler, other = (Sampler(pipeline, 2, 1.0, seed=seed) for seed in (0, 1))
    assert torch.equal(sampler.noise(3), Sampler(pipeline, 9, 7.5, seed=0).noise(3))
    assert not torch.equal(sampler.noise(3), sampler.noise(4))
    assert not torch.equal(sampler.noise(3), other.noise(3))


class SpyUNet(nn.Module):
    """Predicts its input and remembers what it was called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls, self.config = [], SimpleNamespace(time_cond_proj_dim=None)

    def forward(self, sample, timestep, encoder_hidden_states, block_mask=None, return_dict=True):
        self.calls.append({"sample": sample, "t": timestep, "text": encoder_hidden_states, "mask": block_mask})
        return (sample,)


def test_block_masks_reach_both_halves_of_a_guidance_batch():
    unet = SpyUNet()
    sampler = Sampler(small_pipeline("epsilon"), steps=2, guidance_scale=3.0)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    sampler.images(unet, PROMPTS, [0, 0], block_mask_BN=mask)
    for call in unet.calls:
        assert torch.equal(call["mask"], torch.cat([mask, mask]))
        assert isinstance(call["t"], torch.Tensor)
        assert torch.equal(call["text"][2], call["text"][3]) and not torch.equal(call["text"][1], call["text"][2])
    assert len(unet.calls) == 2


def test_without_guidance_there_is_no_unconditional_half():
    unet = SpyUNet()
    Sampler(small_pipeline("epsilon"), steps=1, guidance_scale=1.0).images(unet, PROMPTS, [0, 1])
    assert [len(call["sample"]) for call in unet.calls] == [2]
    assert unet.calls[0]["mask"] is None


def test_texts_are_encoded_once_per_prompt_set(monkeypatch):
    pipeline = small_pipeline("epsilon")
    sampler = Sampler(pipeline, steps=1, guidance_scale=2.0)
    texts = sampler.encode(PROMPTS)
    monkeypatch.setattr(pipeline, "encode_prompt", lambda *_, **__: pytest.fail("encoded again"))
    assert sampler.encode(list(PROMPTS)) is texts and len(texts) == len(PROMPTS)
    assert torch.equal(texts.rows([2, 0]).tensors["text"], texts.tensors["text"][[2, 0]])


def test_decoding_rounds_as_the_pipelines_image_processor():
    pipeline = small_pipeline("epsilon")
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    expected = [np.array(image) for image in pipeline.image_processor.postprocess(decoded)]
    assert torch.equal(Sampler(pipeline, 1, 1.0).decode(latents).permute(0, 2, 3, 1), torch.tensor(np.stack(expected)))


def test_rounding_of_halves_is_that_of_numpy():
    halves = (torch.arange(256, dtype=torch.float32) + 0.5) / 255 * 2 - 1
    pipeline = small_pipeline("epsilon")
    pipeline.vae.decode = lambda z, return_dict: (halves.expand(1, 3, 1, 256),)
    expected = np.array(pipeline.image_processor.postprocess(halves.expand(1, 3, 1, 256))[0])
    decoded = Sampler(pipeline, 1, 1.0).decode(torch.zeros(1, 4, 1, 1))
    assert torch.equal(decoded[0].permute(1, 2, 0), torch.from_numpy(expected))


def test_no_steps_is_refused():
    with pytest.raises(ValueError, match="steps is 0"):
        Sampler(small_pipeline("epsilon"), steps=0, guidance_scale=1.0)


def test_a_closed_mask_samples_as_the_pruned_unet_does():
    pipeline = small_pipeline("epsilon")
    unet = PrunableUNet2DConditionModel.from_unet(pipeline.unet).eval()
    sampler = Sampler(pipeline, steps=3, guidance_scale=3.0)
    mask = torch.ones(2, len(unet.kept_blocks), dtype=torch.bool)
    mask[0, 1] = False
    masked = sampler.images(unet, PROMPTS, [1, 1], block_mask_BN=mask)
    pruned = sampler.images(unet.with_architecture({unet.kept_blocks[1]: 0}), PROMPTS, [1, 1])
    assert torch.equal(masked[0], pruned[0])
    assert torch.equal(masked[1], sampler.images(unet, PROMPTS, [1, 1])[1])
    assert not torch.equal(masked[0], masked[1])


@pytest.mark.slow
def test_all_steps_and_batches_share_one_compiled_graph():
    pipeline = small_pipeline("epsilon")
    unet = PrunableUNet2DConditionModel.from_unet(pipeline.unet).eval()
    sampler = Sampler(pipeline, steps=3, guidance_scale=3.0)
    mask = torch.ones(2, len(unet.kept_blocks), dtype=torch.bool)
    graphs = CompileCounter()
    compiled = torch.compile(unet, fullgraph=True, backend=graphs)
    for closed in range(2):
        mask[:, closed] = False
        images = sampler.images(compiled, PROMPTS, [0, closed], block_mask_BN=mask)
        assert torch.equal(images, sampler.images(unet, PROMPTS, [0, closed], block_mask_BN=mask))
    assert graphs.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_what_the_cpu_draws():
    pipeline = small_pipeline("epsilon")
    sampler = Sampler(pipeline, steps=4, guidance_scale=3.0)
    expected = sampler.images(pipeline.unet, PROMPTS, [0, 1])
    pipeline.to("cuda")
    images = Sampler(pipeline, steps=4, guidance_scale=3.0).images(pipeline.unet, PROMPTS, [0, 1])
    assert images.device.type == "cuda"
    assert (images.cpu().int() - expected.int()).abs().max() <= 2


def test_evaluations_of_the_unet_are_counted_as_the_scheduler_asks_for_them():
    pipeline = small_pipeline("epsilon")
    requested = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: requested.append(len(inputs[0])))
    for kind in (PNDMScheduler, HeunDiscreteScheduler, EulerDiscreteScheduler):
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        for guidance in (1.0, 3.0):
            requested.clear()
            sampler = Sampler(pipeline, steps=5, guidance_scale=guidance)
            sampler.images(pipeline.unet, PROMPTS, [0])
            assert sum(requested) == sampler.evaluations(pipeline.unet)


@pytest.mark.parametrize(
    ("part", "message"),
    [("vae.decoder", "AutoencoderKL in float32 made images"), ("unet", "UNet2DConditionModel in float32 made latents")],
)
def test_images_that_are_not_finite_are_an_error_and_not_black(part, message):
    pipeline = small_pipeline("epsilon")
    torch.nn.init.constant_(attrgetter(part)(pipeline).conv_out.bias, torch.nan)
    sampler = Sampler(pipeline, steps=1, guidance_scale=1.0)
    with pytest.raises(ValueError, match=f"{message} that are not finite"):
        sampler.images(pipeline.unet, PROMPTS, [0])
    with pytest.raises(ValueError, match="made images that are not finite"):
        sampler.decode(torch.full((1, 4, 8, 8), torch.nan))


def test_decoding_keeps_nothing_for_gradients():
    pipeline = small_pipeline("epsilon")
    assert pipeline.vae.decoder.conv_out.weight.requires_grad
    assert not Sampler(pipeline, steps=1, guidance_scale=1.0).pixels(torch.randn(1, 4, 8, 8)).requires_grad


def test_an_autoencoder_is_given_a_few_large_images_at_a_time(monkeypatch):
    pipeline, given = small_pipeline("epsilon"), []
    sampler, latents = Sampler(pipeline, steps=1, guidance_scale=1.0), torch.randn(5, 4, 8, 8)
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    one_by_one = torch.cat([sampler.decode(row) for row in latents.split(1)])
    together = encode_images(pipeline, images, torch.device("cpu"))["latents"]
    for half in (pipeline.vae.encoder, pipeline.vae.decoder):
        half.register_forward_pre_hook(lambda module, inputs: given.append(len(inputs[0])))
    monkeypatch.setattr("slimstep.data.encoding.PIXELS_AT_ONCE", 2 * 16 * 16)
    assert (sampler.decode(latents).int() - one_by_one.int()).abs().max() <= 1 and given == [2, 2, 1]
    torch.testing.assert_close(encode_images(pipeline, images, torch.device("cpu"))["latents"], together)
    assert given == [2, 2, 1] * 2


def test_rows_of_texts_are_those_of_all_bit_for_bit(monkeypatch):
    monkeypatch.setattr("slimstep.eval.sampling.TEXTS_PER_BATCH", 3)
    sampler = Sampler(small_pipeline("epsilon"), steps=1, guidance_scale=3.0)
    whole, some = sampler.encode(PROMPTS).rows([3, 0, 3]), sampler.encode_rows(PROMPTS, [3, 0, 3])
    assert torch.equal(whole.tensors["text"], some.tensors["text"])
