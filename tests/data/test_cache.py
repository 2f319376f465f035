"""The cache holds what the pipeline's own encoders make, whoever made it, however often it was interrupted."""

import copy
import json
import pickle
import threading

import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader

from slimstep.data import cache as cache_module
from slimstep.data import shards as shards_module
from slimstep.data.cache import CachedPairs, cache_pairs, described_cache, text_hashes
from slimstep.data.encoding import tokenizer_hash
from slimstep.data.shards import cache_key
from tests.tiny import WIDTH, tiny_sdxl_pipeline, tiny_tokenizer


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_latents_are_the_scaled_posterior_mean(pipeline, noise_pairs, tmp_path):
    pairs = noise_pairs(4)
    cached = cache_pairs(pairs, pipeline, tmp_path, batch_size=4)
    images = torch.stack([pairs[i]["image"] for i in range(4)])
    with torch.no_grad():
        mean = pipeline.vae.eval().encode(images / 127.5 - 1).latent_dist.mode()
    expected = mean * pipeline.vae.config.scaling_factor
    assert torch.equal(torch.stack([cached[i]["latents"] for i in range(4)]), expected)


def test_text_states_are_those_of_the_pipelines_encode_prompt(pipeline, noise_pairs, tmp_path):
    cached = cache_pairs(noise_pairs(), pipeline, tmp_path)
    captions = [cached.caption(i) for i in range(len(cached))]
    pipeline.text_encoder.eval()
    text, negative = pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=True)
    torch.testing.assert_close(torch.stack([cached[i]["text"] for i in range(10)]), text.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(cached.unconditional.tensors["text"][0], negative[0].detach(), atol=1e-5, rtol=0)


def test_items_keep_their_order_index_and_caption(pipeline, noise_pairs, tmp_path):
    pairs = noise_pairs()
    cached = cache_pairs(pairs, pipeline, tmp_path, shard_size=4)
    assert len(cached) == 10
    assert [cached[i]["index"] for i in range(10)] == list(range(10))
    assert [cached.caption(i) for i in range(10)] == [pairs.captions[i % 3] for i in range(10)]
    with pytest.raises(IndexError, match="sample 10 of a cache of 10"):
        cached[10]


def test_a_text_is_stored_once_per_shard(pipeline, noise_pairs, tmp_path):
    cached = cache_pairs(noise_pairs(), pipeline, tmp_path)
    with safe_open(cached.folder / "shard-00000.safetensors", "pt") as shard:
        assert shard.get_slice("caption.text").get_shape() == [3, 16, 16]
        assert shard.get_slice("sample.latents").get_shape() == [10, 4, 4, 4]


def test_a_finished_cache_is_not_made_again(pipeline, noise_pairs, tmp_path):
    first = cache_pairs(noise_pairs(), pipeline, tmp_path, shard_size=4)
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    again = noise_pairs()
    second = cache_pairs(again, pipeline, tmp_path, shard_size=4)
    assert again.asked == []
    assert {path: path.stat().st_mtime_ns for path in second.folder.iterdir() if "lock" not in path.name} == {
        path: time for path, time in times.items() if "lock" not in path.name
    }


def test_a_killed_caching_goes_on_at_its_shard_and_ends_the_same(pipeline, noise_pairs, tmp_path):
    class Killed(noise_pairs):
        def __getitem__(self, index):
            if index == 6:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        cache_pairs(Killed(), pipeline, tmp_path / "killed", batch_size=2, shard_size=4)
    pairs = noise_pairs()
    resumed = cache_pairs(pairs, pipeline, tmp_path / "killed", batch_size=2, shard_size=4)
    assert pairs.asked == [4, 5, 6, 7, 8, 9]
    whole = cache_pairs(noise_pairs(), pipeline, tmp_path / "whole", batch_size=2, shard_size=4)
    assert folder_bytes(resumed.folder) == folder_bytes(whole.folder)


@pytest.mark.parametrize("damage", ["cut short", "one bit", "no record", "another record", "no text", "gone"])
def test_a_damaged_shard_is_made_again_and_only_it(pipeline, noise_pairs, tmp_path, damage):
    cached = cache_pairs(noise_pairs(), pipeline, tmp_path, shard_size=4)
    before = folder_bytes(cached.folder)
    shard = cached.folder / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "cut short":
        shard.write_bytes(content[:-100])
    elif damage == "one bit":
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage in ("another record", "no text"):
        shard.with_suffix(".json").write_bytes(b"{}" if damage == "another record" else b"\xff")
    else:
        (shard.with_suffix(".json") if damage == "no record" else shard).unlink()
    pairs = noise_pairs()
    again = cache_pairs(pairs, pipeline, tmp_path, shard_size=4)
    assert pairs.asked == [4, 5, 6, 7]
    assert folder_bytes(again.folder) == before


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff"])
def test_a_damaged_index_is_written_again(pipeline, noise_pairs, tmp_path, content):
    cached = cache_pairs(noise_pairs(), pipeline, tmp_path, shard_size=4)
    before, pairs = folder_bytes(cached.folder), noise_pairs()
    (cached.folder / "index.json").write_bytes(content)
    assert folder_bytes(cache_pairs(pairs, pipeline, tmp_path, shard_size=4).folder) == before and not pairs.asked


def test_two_processes_make_the_same_files_as_one(pipeline, noise_pairs, tmp_path, monkeypatch):
    barrier, requested = threading.Barrier(2), {}
    monkeypatch.setattr(cache_module, "agree", lambda folder, world: None)

    class Rank:
        num_processes, device = 2, torch.device("cpu")

        def __init__(self, process_index):
            self.process_index = process_index

        def wait_for_everyone(self):
            barrier.wait(timeout=60)

    def work(rank, pipeline):
        pairs = noise_pairs()
        cache_pairs(pairs, pipeline, tmp_path / "two", shard_size=3, accelerator=Rank(rank))
        requested[rank] = pairs.asked

    threads = [threading.Thread(target=work, args=(rank, copy.deepcopy(pipeline))) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert requested == {0: [0, 1, 2, 6, 7, 8], 1: [3, 4, 5, 9]}
    one = cache_pairs(noise_pairs(), pipeline, tmp_path / "one", shard_size=3)
    two = folder_bytes(tmp_path / "two" / one.folder.name)
    assert {name: data for name, data in two.items() if "lock" not in name} == {
        name: data for name, data in folder_bytes(one.folder).items() if "lock" not in name
    }


def test_worker_processes_read_the_same(pipeline, noise_pairs, tmp_path):
    alone = cache_pairs(noise_pairs(), pipeline, tmp_path / "alone", batch_size=4)
    helped = cache_pairs(noise_pairs(), pipeline, tmp_path / "helped", batch_size=4, workers=1)
    assert folder_bytes(alone.folder) == folder_bytes(helped.folder)
    batches = list(DataLoader(alone, batch_size=5, num_workers=1))
    assert torch.equal(batches[1]["latents"][0], alone[5]["latents"])
    assert torch.equal(pickle.loads(pickle.dumps(alone))[5]["text"], alone[5]["text"])


@pytest.mark.parametrize("change", ["vae", "text_encoder", "pairs", "dtype", "vae config", "tokenizer"])
def test_the_key_changes_with_what_made_the_cache(pipeline, noise_pairs, tmp_path, change):
    before = cache_pairs(noise_pairs(2), pipeline, tmp_path)
    pairs, dtype = noise_pairs(2), "float32"
    if change in ("vae", "text_encoder"):
        with torch.no_grad():
            next(getattr(pipeline, change).parameters()).add_(1e-3)
    elif change == "vae config":
        pipeline.vae.register_to_config(scaling_factor=0.5)
    elif change == "pairs":
        pairs = noise_pairs(3)
    elif change == "dtype":
        dtype = "float16"
    else:
        pipeline.tokenizer.model_max_length = 8
    assert cache_pairs(pairs, pipeline, tmp_path, dtype=dtype).fingerprint != before.fingerprint


def test_the_key_does_not_change_with_a_reload_of_the_pipeline(pipeline, noise_pairs, tmp_path):
    before = cache_pairs(noise_pairs(2), pipeline, tmp_path / "cache")
    pipeline.save_pretrained(tmp_path / "saved")
    reloaded = type(pipeline).from_pretrained(tmp_path / "saved", disable_mmap=True)
    assert cache_pairs(noise_pairs(2), reloaded, tmp_path / "cache").fingerprint == before.fingerprint


def test_half_precision_is_of_storage_alone(pipeline, noise_pairs, tmp_path):
    full = cache_pairs(noise_pairs(), pipeline, tmp_path)
    half = cache_pairs(noise_pairs(), pipeline, tmp_path, dtype="float16")
    assert half[3]["latents"].dtype == half.unconditional.tensors["text"].dtype == torch.float32
    torch.testing.assert_close(half[3]["latents"], full[3]["latents"], rtol=2**-11, atol=1e-6)
    with pytest.raises(ValueError, match="float8.*choose from float32, float16"):
        cache_pairs(noise_pairs(), pipeline, tmp_path, dtype="float8")


def test_a_long_caption_is_cut_as_the_pipeline_cuts_it_and_counted_once(pipeline, noise_pairs, tmp_path, caplog):
    cached = cache_pairs(noise_pairs(), pipeline, tmp_path)
    assert cached.truncated == 3
    said = [record.getMessage() for record in caplog.records if "captions exceed" in record.getMessage()]
    assert said == ["3 of 10 captions exceed the text encoder's length and are cut"]
    ids = pipeline.tokenizer(noise_pairs.captions[2]).input_ids
    expected = pipeline.text_encoder(torch.tensor([ids[:15] + ids[-1:]]))[0][0].detach()
    torch.testing.assert_close(cached[2]["text"], expected, atol=1e-5, rtol=0)


def test_broken_images_are_skipped_and_counted(pipeline, noise_pairs, tmp_path, caplog):
    cached = cache_pairs(noise_pairs(broken=(1, 7), allowed_broken=2), pipeline, tmp_path, batch_size=2, shard_size=4)
    assert [cached[i]["index"] for i in range(len(cached))] == [0, 2, 3, 4, 5, 6, 8, 9]
    assert cached.caption(1) == noise_pairs.captions[2]
    assert "2 broken images are skipped: noise-1 (torn); noise-7 (torn)" in caplog.text


def test_too_many_broken_images_are_an_error_that_names_them(pipeline, noise_pairs, tmp_path):
    with pytest.raises(ValueError, match=r"2 of 10 images cannot be read.*at most 1.*noise-1 \(torn\); noise-7"):
        cache_pairs(noise_pairs(broken=(1, 7), allowed_broken=1), pipeline, tmp_path)


def test_the_limit_of_broken_images_holds_for_a_finished_cache_too(pipeline, noise_pairs, tmp_path):
    cache_pairs(noise_pairs(broken=(1,), allowed_broken=1), pipeline, tmp_path)
    with pytest.raises(ValueError, match="1 of 10 images"):
        cache_pairs(noise_pairs(broken=(1,), allowed_broken=0), pipeline, tmp_path)


def test_a_size_the_pipeline_cannot_take_is_reported_with_the_nearest_legal_ones(pipeline, noise_pairs, tmp_path):
    with pytest.raises(ValueError, match=r"20x20 px.*by 4 .* another 2.*multiples of 8; nearest: 16, 24"):
        cache_pairs(noise_pairs(side=20), pipeline, tmp_path)


def test_an_encoder_that_overflows_is_reported(pipeline, noise_pairs, tmp_path):
    with torch.no_grad():
        pipeline.vae.quant_conv.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="AutoencoderKL in float32 made latents that are not finite"):
        cache_pairs(noise_pairs(), pipeline, tmp_path)


def test_caching_leaves_the_pipeline_and_the_global_random_state_as_they_were(pipeline, noise_pairs, tmp_path):
    pipeline.vae.train()
    pipeline.text_encoder.eval()
    state = torch.get_rng_state()
    cache_pairs(noise_pairs(), pipeline, tmp_path)
    assert pipeline.vae.training and not pipeline.text_encoder.training
    assert torch.equal(torch.get_rng_state(), state)


def test_no_more_than_a_few_shards_are_open_at_once(pipeline, noise_pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "OPEN_SHARDS", 2)
    cached = cache_pairs(noise_pairs(), pipeline, tmp_path, shard_size=2)
    assert [cached[i]["index"] for i in (0, 9, 5, 1, 3)] == [0, 9, 5, 1, 3]
    assert len(cached._open) == 2


def test_an_unfinished_cache_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished cache.*cache_pairs"):
        CachedPairs(tmp_path)


def test_the_index_holds_every_shards_checksum(pipeline, noise_pairs, tmp_path):
    cached = cache_pairs(noise_pairs(), pipeline, tmp_path, shard_size=4)
    index = json.loads((cached.folder / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [4, 4, 2]
    assert all(len(shard["sha256"]) == 64 for shard in index["shards"])
    assert index["made_from"]["pairs"] == "noise/10/16"


def test_another_padding_token_or_empty_prompt_is_another_cache():
    """SDXL's second tokenizer differs from its first by nothing else."""
    assert tokenizer_hash(tiny_tokenizer()) != tokenizer_hash(tiny_tokenizer(pad_token="!"))
    zeros, words = tiny_sdxl_pipeline(), tiny_sdxl_pipeline()
    words.register_to_config(force_zeros_for_empty_prompt=False)
    assert text_hashes(zeros) != text_hashes(words)


def test_a_cache_that_packs_the_pooled_states_is_made_again_with_a_line(noise_pairs, tmp_path, caplog):
    caplog.set_level("INFO", "slimstep")
    sdxl, pairs = tiny_sdxl_pipeline(), noise_pairs(2)
    fields = described_cache(pairs, sdxl, "float32", 512)
    packed = tmp_path / cache_key({"told_size": fields.pop("conditioning_of_size"), **fields})
    packed.mkdir()
    cached = cache_pairs(pairs, sdxl, tmp_path)
    assert cached[0]["pooled"].shape == (WIDTH,) and cached[0]["time_ids"].tolist() == [16, 16, 0, 0, 16, 16]
    assert cached.unconditional.tensors.keys() == {"text", "pooled", "time_ids"}
    cache_pairs(pairs, sdxl, tmp_path)
    lines = [record.getMessage() for record in caplog.records if "earlier form" in record.getMessage()]
    assert len(lines) == 1 and str(packed) in lines[0]
