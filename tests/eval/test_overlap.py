"""Prompts that were seen before: they are counted, and the log and the page say so, or that there are none."""

import json
import re
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from omegaconf import OmegaConf

from slimstep.data.cache import cache_pairs
from slimstep.data.prompts import PromptSet
from slimstep.data.shapes import ShapesPairs
from slimstep.data.webdataset import WebDatasetPairs
from slimstep.distill.job import calibration_prompts
from slimstep.engine.run import Run
from slimstep.eval.config import LatentsConfig
from slimstep.eval.inputs import note_trained_on, seen_prompts
from slimstep.eval.job import seen_in_training
from slimstep.eval.overlap import among, known_captions
from slimstep.eval.pages.run_page import write_report
from slimstep.eval.pages.text import overlap_sentence
from slimstep.prune.vae_latents import training_prompts
from tests.data.tars import picture, write_tar
from tests.eval.run_stub import write_run
from tests.tiny import small_pipeline

PROMPTS = PromptSet(("a cat", "A red  Dog", "a bird", "a cat", "a fish"), "prompts")


def test_a_prompt_is_the_caption_that_a_tokenizer_takes_it_for():
    assert among(PROMPTS, ["a red dog", "two cats", "A CAT\n", "a cat"]) == ["a cat", "A red  Dog"]
    assert among(PROMPTS, []) == [] and among(PROMPTS, iter(PROMPTS)) == list(PROMPTS.distinct)


@pytest.mark.parametrize("captions", [["a dog"], ["a bird", "a cat"], list(PROMPTS)])
def test_what_is_trained_on_is_reported_before_the_first_training_and_kept(tmp_path, caplog, captions):
    caplog.set_level("INFO")
    run = Run(tmp_path, Accelerator(cpu=True))
    assert seen_prompts(run) == {}  # of a run from before this was counted nothing is said
    for _ in range(2):
        note_trained_on(run, PROMPTS, captions)
    expected = {1: 0, 2: 2, 5: 4}[len(captions)]
    assert seen_prompts(run) == {"prompts_in_training": expected}
    (record,) = caplog.records
    assert record.levelname == ("WARNING" if expected else "INFO")
    assert record.message.startswith(f"{expected or 'none'} of ")
    assert ("data.prompt_file=FILE" in record.message) == bool(expected)


def test_a_decoder_trains_on_the_captions_its_latents_are_sampled_from(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a fish\nx\n")
    latents = LatentsConfig(count=8, prompts=2, prompt_file=str(file))
    config = OmegaConf.create({"latents": OmegaConf.structured(latents)})
    teacher = SimpleNamespace(config=config, begins_with_frame=False)
    assert among(PROMPTS, training_prompts(teacher)) == ["a fish"]
    config.latents.real_share = 1.0
    assert training_prompts(teacher) is None


@pytest.mark.parametrize("key", ["calibration_prompts", "ranked_on"])  # now, and in earlier versions
def test_a_pruned_students_calibration_prompts_are_looked_up(tmp_path, key):
    (tmp_path / "prune/export").mkdir(parents=True)
    job = SimpleNamespace(distillation=SimpleNamespace(student=str(tmp_path / "prune/export")))
    assert calibration_prompts(job, PROMPTS) is None
    (tmp_path / "prune/prompts.json").write_text(json.dumps({key: ["a cat", "x"]}))
    assert calibration_prompts(job, PROMPTS) == ["a cat"]


def test_an_evaluation_counts_held_out_captions_that_training_images_have(tmp_path, monkeypatch):
    class Pairs(list):
        caption = list.__getitem__

    config = OmegaConf.create({"data": {"cache": {"folder": str(tmp_path / "cache")}}})
    for captions, seen in ((["a cat", "a fish"], 2), (["a cat"], 1)):
        monkeypatch.setattr("slimstep.eval.job.component", lambda *_, captions=captions: Pairs(captions))
        assert seen_in_training(config, PROMPTS) == {"prompts_in_training_split": seen}


def test_of_a_stream_the_cache_is_looked_up(tmp_path):
    files = {
        name: content for k in "ab" for name, content in ((f"{k}.png", picture(k)), (f"{k}.txt", f"a {k}".encode()))
    }
    pairs = WebDatasetPairs(str(write_tar(tmp_path / "a.tar", files)), 16, "all")
    assert known_captions(pairs, tmp_path / "cache") is None
    cache_pairs(pairs, small_pipeline(), tmp_path / "cache")
    assert sorted(known_captions(pairs, tmp_path / "cache")) == ["a a", "a b"]
    other = WebDatasetPairs(str(tmp_path / "a.tar"), 8, "all")
    assert known_captions(other, tmp_path / "cache") is None


def test_a_caption_is_read_without_drawing_or_encoding_an_image(tmp_path):
    pairs = ShapesPairs("train", 12, resolution=16)
    captions = [pairs[k]["caption"] for k in range(12)]
    assert [pairs.caption(k) for k in range(12)] == captions
    cached = cache_pairs(pairs, small_pipeline(), tmp_path, shard_size=5)
    assert set(cached.distinct_captions()) == set(captions)


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ({}, ""),
        ({"prompts_in_training": 0}, "None of the 8 prompts is among the captions that were trained on."),
        ({"prompts_in_training": 3}, "3 of the 8 prompts are among the captions that were trained on: the scores"),
        ({"prompts_in_training": 0, "prompts_in_calibration": 2}, "0 of the 8 .* trained on; 2 of the 8 prompts are"),
        (
            {"prompts_in_training": 0, "prompts_in_calibration": 0},
            "None of the 8 .* trained on or the prompts that blocks",
        ),
    ],
)
def test_the_sentence_says_what_the_evaluation_knows_and_nothing_else(seen, said):
    sentence = overlap_sentence(8, seen)
    assert re.match(said, sentence) and bool(sentence) == bool(said)


def test_the_page_carries_the_sentence_and_claims_nothing_of_older_runs(tmp_path):
    folder = write_run(tmp_path / "run", n=8)
    assert "trained on" not in write_report(folder).read_text()
    seen = {"prompts_in_training": 3}
    evaluation = json.loads((folder / "evaluation.json").read_text()) | {"seen": seen}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    assert overlap_sentence(8, seen) in write_report(folder).read_text()
