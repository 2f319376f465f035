"""Of text states with a mask the cache keeps the tokens that it has, and training on it is training on all of them."""

import json
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from safetensors.torch import load_file
from torch.utils.data import Dataset

from scripts.random_transformers import (
    small_flux_pipeline,
    small_pixart_pipeline,
    small_qwen_image_pipeline,
    small_sana_pipeline,
)
from slimstep.data.cache import cache_pairs
from slimstep.data.shards import CachedPairs, write_index, write_shard
from slimstep.distill.prediction import Denoising
from slimstep.engine.config import TrainConfig
from slimstep.engine.loop import train
from slimstep.engine.run import Run
from slimstep.models.conditioning import all_tokens, used_tokens
from slimstep.models.family import denoiser_of, family_of, schedule_for
from slimstep.models.flow import prediction_type_of

MASKED = {
    "PixArt-α": lambda: small_pixart_pipeline(PixArtAlphaPipeline),
    "PixArt-Σ": lambda: small_pixart_pipeline(PixArtSigmaPipeline),
    "Sana": small_sana_pipeline,
    "Qwen-Image": small_qwen_image_pipeline,
}
TRAINING = TrainConfig(steps=3, batch_size=4, learning_rate=1e-3, warmup_steps=0, ema_decay=0)
LENGTHS = {"PixArt-α": 120, "PixArt-Σ": 300, "Sana": 300, "Qwen-Image": 512}


@pytest.fixture(params=MASKED)
def name(request):
    return request.param


@pytest.fixture
def cached(name, noise_pairs, tmp_path):
    """The pipeline, and the cache of six of its samples in two shards."""
    pipeline = MASKED[name]()
    pairs = noise_pairs(6, side=32 if name == "Sana" else 16)
    return pipeline, cache_pairs(pairs, pipeline, tmp_path / "cache", batch_size=2, shard_size=4)


class WholeStates(Dataset):
    """The samples of a cache with all states of their captions, as the pipeline makes them."""

    def __init__(self, pipeline, cached):
        captions = [cached.caption(i) for i in range(len(cached))]
        with torch.no_grad():
            self.cond = family_of(pipeline).encode(pipeline, captions)
            self.unconditional = family_of(pipeline).unconditional(pipeline)
        self.cached = cached

    def __len__(self):
        return len(self.cached)

    def __getitem__(self, i):
        return {**self.cached[i], **{name: tensor[i] for name, tensor in self.cond.tensors.items()}}


def test_used_tokens_and_their_places_are_inverse():
    text, mask = torch.randn(3, 5, 2), torch.tensor([[1.0, 1, 0, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]])
    packed = used_tokens({"text": text, "text_mask": mask})["text"]
    starts = [0, *mask.sum(1).cumsum(0).int().tolist()]
    for row, (start, end) in enumerate(pairwise(starts)):
        assert torch.equal(all_tokens(packed[start:end], mask[row]), text[row] * mask[row, :, None])
    assert torch.equal(used_tokens({"text": text})["text"], text)


def test_items_have_the_used_states_in_their_places_and_no_others(name, cached):
    pipeline, pairs = cached
    whole = WholeStates(pipeline, pairs)
    for i in range(len(pairs)):
        own, full = pairs[i], whole[i]
        assert torch.equal(own["text_mask"], full["text_mask"]) and len(own["text"]) == LENGTHS[name]
        torch.testing.assert_close(own["text"], full["text"] * full["text_mask"][:, None], atol=1e-5, rtol=1e-5)
    empty = pairs.unconditional.tensors
    full = whole.unconditional.tensors
    torch.testing.assert_close(empty["text"], full["text"] * full["text_mask"][..., None], atol=1e-5, rtol=1e-5)


def test_shards_are_smaller_by_all_unused_tokens_and_whole_ones_are_read_as_before(cached, tmp_path):
    pipeline, pairs = cached
    captions = list(pairs.distinct_captions())
    with torch.no_grad():
        whole = family_of(pipeline).encode(pipeline, captions).tensors
    unused = int((whole["text_mask"] == 0).sum()) * whole["text"].shape[2] * 4
    assert unused > whole["text"].nbytes / 2, "captions are short"
    earlier, saved = tmp_path / "earlier", 0
    paths = sorted(pairs.folder.glob("shard-*.safetensors"))
    for path in (*paths, pairs.folder / "empty.safetensors"):
        tensors = load_file(path)
        states, mask = tensors.pop("token.text"), tensors["caption.text_mask"]
        ends = [0, *(mask > 0).sum(1).cumsum(0).tolist()]
        rows = [all_tokens(states[start:end], row) for row, (start, end) in zip(mask, pairwise(ends), strict=True)]
        earlier.mkdir(exist_ok=True)
        record = json.loads(path.with_suffix(".json").read_text())
        kept = {key: record[key] for key in ("samples", "truncated", "broken") if key in record}
        write_shard(earlier / path.name, {**tensors, "caption.text": torch.stack(rows)}, kept)
        saved += ((earlier / path.name).stat().st_size - path.stat().st_size) * (path in paths)
    assert abs(saved - unused) <= 64 * len(paths), "but for the headers"
    write_index(earlier, pairs.made_from, [earlier / path.name for path in paths])
    before = CachedPairs(earlier)
    for i in range(len(pairs)):
        assert all(torch.equal(before[i][key], pairs[i][key]) for key in ("latents", "text", "text_mask"))
    assert torch.equal(before.unconditional.tensors["text"], pairs.unconditional.tensors["text"])


def test_training_on_the_cache_is_training_on_all_states(cached, tmp_path):
    pipeline, pairs = cached
    weights = {}
    for way, data in {"cut": pairs, "whole": WholeStates(pipeline, pairs)}.items():
        student = type(pipeline.transformer).from_config(pipeline.transformer.config)
        student.load_state_dict(pipeline.transformer.state_dict())
        denoiser = denoiser_of(student, prediction_type_of(pipeline.scheduler))
        objective = Denoising(denoiser, schedule_for(pipeline), data.unconditional, student, caption_dropout=0.5)
        run = Run(tmp_path / way, Accelerator(cpu=True), seed=0)
        train(student, objective, data, TRAINING, run, "stage")
        weights[way] = student.state_dict()
    before = pipeline.transformer.state_dict()
    assert any(not torch.allclose(weights["cut"][key], before[key], atol=1e-4) for key in before), "it has learnt"
    torch.testing.assert_close(weights["cut"], weights["whole"], atol=1e-5, rtol=1e-4)


def test_without_a_mask_all_states_are_kept(noise_pairs, tmp_path):
    pairs = cache_pairs(noise_pairs(2), small_flux_pipeline(), tmp_path)
    assert pairs[0]["text"].shape[0] == 512 and (pairs[0]["text"] != 0).any(1).all()
