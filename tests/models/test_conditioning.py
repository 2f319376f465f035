"""SDXL's two text states, pooled state and sizes travel as one tensor, and reach the UNet as diffusers brings them."""

import pytest
import torch

from slimstep.data.encoding import encode_captions, encode_nothing
from slimstep.eval.sampling import Sampler
from slimstep.models.conditioning import text_states
from slimstep.models.pipeline import load_pipeline
from slimstep.models.unet import PrunableUNet2DConditionModel, apart
from tests.tiny import WIDTH, tiny_pipeline, tiny_sdxl_pipeline

PROMPTS = ["a cat", "two dogs and a cow"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    tiny_sdxl_pipeline("v_prediction").save_pretrained(folder)
    return load_pipeline(folder)


def test_what_was_put_together_comes_apart(sdxl):
    with torch.no_grad():
        together = text_states(sdxl, PROMPTS, "cpu")
        states, _, pooled, _ = sdxl.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert together.shape == (2, 16 + 1, 2 * WIDTH)
    text, added = apart(sdxl.unet, together)
    assert torch.equal(text, states) and torch.equal(added["text_embeds"], pooled)
    assert added["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


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
        nothing = encode_nothing(sdxl, "cpu")["text"]
        assert encode_captions(sdxl, PROMPTS, "cpu")["text"].shape[1:] == nothing.shape[1:]
    text, added = apart(sdxl.unet, nothing)
    assert not text.any() and not added["text_embeds"].any()  # force_zeros_for_empty_prompt


def test_conditions_given_apart_are_left_alone(sdxl):
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 500])
    with torch.no_grad():
        together = text_states(sdxl, PROMPTS, "cpu")
        text, added = apart(sdxl.unet, together)
        assert torch.equal(sdxl.unet(z, t, together).sample, sdxl.unet(z, t, text, added_cond_kwargs=added).sample)


def test_one_text_encoder_has_no_further_rows():
    pipeline = tiny_pipeline()
    unet = PrunableUNet2DConditionModel.from_unet(pipeline.unet)
    with torch.no_grad():
        assert text_states(pipeline, PROMPTS, "cpu").shape == (2, 16, WIDTH)
        text = torch.randn(2, 5, WIDTH)
        z, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 500])
        assert torch.equal(unet(z, t, text).sample, pipeline.unet(z, t, text).sample)
