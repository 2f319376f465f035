"""The recipe of the small cascade of DeepFloyd IF's kind: what its variance learns from, and how captions are read.

tests/models/families/test_deepfloyd_jobs.py trains it for a few steps, and prunes what stock diffusers loads of it.
"""

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from scripts.shapes_cascade_recipe import SCHEDULER, CaptionReader, build_t5_tokenizer, step_divergence
from slimstep.data.shapes_tokenizer import WORDS


@pytest.mark.parametrize("t", [1, 20, 500, 998])
def test_the_bound_is_the_divergence_of_stock_ddpms_step_from_the_posterior(t):
    scheduler = DDPMScheduler(**{**SCHEDULER, "thresholding": False}, clip_sample=False)
    draw = torch.Generator().manual_seed(0)
    x_t, noise, error = (torch.randn(1, 3, 2, 2, generator=draw) for _ in range(3))
    variance = torch.rand(1, 3, 2, 2, generator=draw) * 2 - 1

    def stepped(predicted: torch.Tensor) -> torch.Tensor:
        both = torch.cat([predicted, variance], dim=1)
        return scheduler.step(both, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample

    moved = stepped(noise + error) - stepped(noise)  # the noise that both add is the same
    true = scheduler._get_variance(t, variance_type="fixed_small").sqrt()
    theirs = Normal(moved, (scheduler._get_variance(t, variance) / 2).exp())
    ours = step_divergence(scheduler, error, variance, torch.tensor([t]))
    torch.testing.assert_close(ours, kl_divergence(Normal(torch.zeros_like(moved), true), theirs), rtol=1e-2, atol=1e-5)


def test_the_bound_is_least_at_the_variance_that_the_error_asks_for():
    """Where the noise is known it is that of the posterior, −1; where nothing is, a larger one. t = 0 asks for none."""
    scheduler, t_B = DDPMScheduler(**SCHEDULER), torch.tensor([1, 1, 0])
    shares_N = torch.linspace(-1, 1, 41)
    errors = torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 1, 41)
    divergence = step_divergence(scheduler, errors, shares_N.expand(3, 1, 1, 41), t_B)[:, 0, 0]
    known, unknown, last = divergence.argmin(1).tolist()
    assert divergence[0, 0].abs() < 1e-6 and known == 0 and unknown > known
    assert not divergence[2].any() and last == 0


def test_every_word_of_captions_is_a_token_and_the_end_is_read_without_the_padding(tmp_path):
    build_t5_tokenizer().save_pretrained(tmp_path)
    tokenizer = T5TokenizerFast.from_pretrained(tmp_path)
    ids = tokenizer(" ".join(WORDS)).input_ids
    assert len(ids) == len(WORDS) + 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("a zebra, blue", add_special_tokens=False).input_ids) == "a zebra, blue"
    config = T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    reader = CaptionReader(T5EncoderModel(config), [2, 3]).eval()
    texts, padded = ["two blue rings", "a ring"], {"padding": "max_length", "return_tensors": "pt"}
    short, long = (reader(tokenizer(texts, max_length=n, **padded).input_ids)[1] for n in (9, 77))
    assert [logits.shape for logits in short] == [(2, 2), (2, 3)]
    torch.testing.assert_close(short, long)
