"""Conditioning is a value whose rows are picked and joined, and reaches the network as diffusers brings it."""

import pytest
import torch

from slimstep.data.encoding import encode_captions, encode_nothing
from slimstep.eval.sampling import Sampler
from slimstep.models import conditioning
from slimstep.models.conditioning import Conditioning, cleans_captions, conditioning_of
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.families.unet2d.text import encode_prompts
from slimstep.models.family import denoiser_of
from slimstep.models.pipeline import load_pipeline
from tests.tiny import WIDTH, tiny_pipeline, tiny_sdxl_pipeline

PROMPTS = ["a cat", "two dogs and a cow"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_sdxl_pipeline("v_prediction").save_pretrained(folder)
    return load_pipeline(folder)


def some(rows, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Conditioning({"text": torch.randn(rows, 5, 3, generator=draw), "class_id": torch.arange(rows) + 10 * seed})


def equal(a, b):
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


def test_rows_of_joined_parts_are_the_parts():
    a, b = some(3), some(2, seed=1)
    both = Conditioning.cat(a, b)
    assert len(both) == 5 and equal(both.rows(slice(3)), a) and equal(both.rows([3, 4]), b)
    assert equal(Conditioning.cat(*(both.rows([i]) for i in range(5))), both)
    assert equal(both.rows([4, 0, 4]).rows(torch.tensor([1, 0])), both.rows([0, 4]))


def test_where_takes_every_row_from_one_or_the_other():
    a, b, nothing = some(4), some(4, seed=1), some(1, seed=2)
    keep = torch.tensor([True, False, False, True])
    mixed = a.where(keep, b)
    assert all(equal(mixed.rows([i]), (a if keep[i] else b).rows([i])) for i in range(4))
    assert equal(a.where(keep, nothing), a.where(keep, nothing.expand(4)))
    assert equal(a.where(keep | True, b), a) and equal(a.where(keep & False, b), b)


def test_whole_numbers_keep_their_dtype():
    half = some(2).to(dtype=torch.bfloat16)
    assert half.tensors["text"].dtype == torch.bfloat16 and half.tensors["class_id"].dtype == torch.int64


def test_nothing_stays_nothing():
    """An unconditional model's conditioning fits a batch of any size."""
    nothing = Conditioning()
    others = [nothing.rows([0, 1]), nothing.expand(3), nothing.to("cpu", torch.half)]
    others += [Conditioning.cat(nothing, nothing), nothing.where(torch.ones(3, dtype=torch.bool), nothing)]
    others += [conditioning_of({"latents": 0}, nothing)]
    assert all(equal(other, nothing) and len(other) == 0 for other in others)


def test_other_names_are_not_mixed():
    with pytest.raises(AssertionError, match=r"\['text', 'class_id'\] beside \[\]"):
        Conditioning.cat(some(1), Conditioning())


def test_an_sdxl_has_its_pooled_states_and_sizes_beside_its_text_states(sdxl):
    with torch.no_grad():
        cond = encode_prompts(sdxl, PROMPTS, "cpu")
        states, _, pooled, _ = sdxl.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert cond.tensors["text"].shape == (2, 16, 2 * WIDTH)
    assert torch.equal(cond.tensors["text"], states) and torch.equal(cond.tensors["pooled"], pooled)
    assert cond.tensors["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_our_images_are_those_of_the_stock_pipeline(sdxl, guidance_scale):
    sampler = Sampler(sdxl, 3, guidance_scale)
    noise = torch.stack([sampler.noise(i) for i in range(2)])
    ours = sampler.latents(sdxl.unet, sampler.encode(PROMPTS), noise)
    stock = tiny_sdxl_pipeline("v_prediction")
    theirs = stock(PROMPTS, latents=noise, num_inference_steps=3, guidance_scale=guidance_scale, height=16, width=16,
                   output_type="latent").images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_guidance_steers_away_from_what_the_pipeline_says(sdxl):
    with torch.no_grad():
        cond, nothing = encode_captions(sdxl, PROMPTS, "cpu"), encode_nothing(sdxl, "cpu")
    assert equal(Conditioning.cat(cond, nothing).rows([2]), nothing)
    assert not nothing.tensors["text"].any() and not nothing.tensors["pooled"].any()  # force_zeros_for_empty_prompt


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_the_denoiser_calls_as_diffusers_calls(make):
    unet = make().unet
    prunable, denoiser = PrunableUNet2DConditionModel.from_unet(unet), denoiser_of(unet, "epsilon")
    assert (denoiser.prediction_type, denoiser.sample_shape) == ("epsilon", (4, 8, 8))
    x_t, t_B, cond = denoiser.example(unet, 2, tokens=5, generator=torch.Generator().manual_seed(0))
    names = {"text": "encoder_hidden_states", "pooled": "text_embeds", "time_ids": "time_ids"}
    given = {names[name]: tensor for name, tensor in cond.tensors.items()}
    added = {"added_cond_kwargs": given} if len(given) > 1 else {}
    with torch.no_grad():
        stock = unet(x_t, t_B, given.pop("encoder_hidden_states"), **added).sample
        assert torch.equal(denoiser(prunable, x_t, t_B, cond), stock)
        assert torch.equal(denoiser(prunable, x_t, t_B[0], cond), stock)
        half = denoiser(prunable.to(torch.bfloat16), x_t, t_B, cond)
    assert half.dtype == torch.float32 and not torch.equal(half, stock)


def test_captions_are_cleaned_where_the_packages_for_it_are_and_else_that_is_said_once(monkeypatch, caplog):
    for there in (True, False):
        monkeypatch.setattr(conditioning, "is_bs4_available", lambda there=there: there)
        cleans_captions.cache_clear()
        with caplog.at_level("INFO", logger="slimstep"):
            assert [cleans_captions(), cleans_captions()] == [there, there]
    assert caplog.text.count("beautifulsoup4") == 1
    cleans_captions.cache_clear()
