"""The caching job: what it tells, what it makes once, and that training afterwards encodes nothing."""

import json
import re
import sys

import hydra
import pytest
from accelerate import Accelerator
from diffusers import AutoencoderKL
from omegaconf import OmegaConf
from transformers import CLIPTextModel

from slimstep.configs.schema import Config
from slimstep.data.webdataset import WebDatasetPairs
from slimstep.engine.checked import CONFIGS
from slimstep.engine.launch import main
from slimstep.engine.run import Run
from slimstep.eval.inputs import load_teacher, training_data
from slimstep.eval.training import train_stage
from slimstep.prune.job import prunable_copy
from tests.data.tars import captioned, picture, sound, write_tar, write_tars
from tests.test_processes import launch
from tests.test_user_errors import JOB
from tests.user_errors import error_line

CACHE = "+experiment=cache_latents"


@pytest.fixture
def tars(tmp_path):
    """Forty samples in two tars, one broken."""
    (tmp_path / "tars").mkdir()
    write_tars(tmp_path / "tars", tars=2, samples=20)
    write_tar(tmp_path / "tars/part-000.tar", {**sound([f"{i:03d}" for i in range(20)]), "x.png": picture("x")})
    source = ["data=webdataset", f"data.source={tmp_path}/tars/*.tar"]
    return [*source, "data.max_broken=2", "data.cache.shard_size=8"]


@pytest.fixture
def cache(monkeypatch, capsys, tmp_path):
    """Runs the job to its good end; {first word: rest} of what it printed."""

    def run(*overrides):
        monkeypatch.setattr(sys, "argv", ["train.py", f"root={tmp_path / 'runs'}", CACHE, *overrides])
        with pytest.raises(SystemExit) as leaving:
            main()
        out, err = capsys.readouterr()
        assert leaving.value.code == 0, err
        return dict(line.split(maxsplit=1) for line in out.splitlines())

    return run


def test_a_plan_tells_place_samples_and_disk_and_makes_nothing(cache, tars, tiny_model, tmp_path):
    planned = cache(*tars, *tiny_model, "plan=true")
    assert not (tmp_path / "runs").exists()
    assert planned["samples"] == "not known before they are read, in 2 parts" and planned["there"].startswith(
        "0 shards"
    )
    latents, text = 2 * 4 * 8 * 8, 2 * 16 * 16  # float16: 8×8 latents of 4 channels, 16 tokens of width 16
    assert f"{(latents + text) / 1000:.3g} GB a million: {latents} B an image, {text} B a caption" in planned["disk"]
    known = cache("data.pairs.size=50", *tiny_model, "plan=true")
    assert known["samples"] == "50" and known["disk"].startswith(f"{50 * 4 * (256 + 256) / 1000:.3g} kB at most")


def test_what_is_planned_is_made_once_and_found_by_the_next_run(cache, tars, tiny_model, caplog):
    planned = cache(*tars, *tiny_model, "plan=true")
    caplog.set_level("INFO", "slimstep")
    made = cache(*tars, *tiny_model)
    assert made["cache"].endswith(planned["cache"]) and "broken and skipped 1; captions cut" in made["samples"]
    assert "images and captions encoded in" in caplog.text
    caplog.clear()
    assert cache(*tars, *tiny_model, "data.max_broken=3", "data.cache.workers=1") == made  # no other configuration
    assert cache(*tars, *tiny_model) == made and "encoded" not in caplog.text
    assert cache(*tars, *tiny_model, "plan=true")["there"].split()[0] != "0"


def test_training_from_the_cache_touches_neither_vae_nor_text_encoder(cache, tars, tiny_model, tmp_path, monkeypatch):
    made = cache(*tars, *tiny_model)

    def untouchable(*_, **__):
        raise AssertionError("the frozen half of the pipeline is asked for something")

    monkeypatch.setattr(AutoencoderKL, "encode", untouchable)
    monkeypatch.setattr(CLIPTextModel, "forward", untouchable)
    read = WebDatasetPairs.read  # tars are opened for their first key, and for the captions of held-out samples
    monkeypatch.setattr(WebDatasetPairs, "read", lambda pairs, part, start, images=True: (
        untouchable() if images or pairs.split == "train" else read(pairs, part, start, images)))
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\nfour\n")
    overrides = ["+experiment=prune_unet", f"root={tmp_path / 'runs'}", "train.steps=3", "train.batch_size=4",
                 "scoring.prompts=2", "eval.prompts=2", f"data.prompt_file={tmp_path / 'prompts.txt'}"]  # fmt: skip
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra.compose("train", [*overrides, *tars, *tiny_model])
    config = OmegaConf.merge(OmegaConf.structured(Config), composed)
    teacher = load_teacher(config, Run(tmp_path / "runs/prune_unet", Accelerator(cpu=True)))
    pairs = training_data(teacher)
    train_stage(prunable_copy(teacher), "round-00", config.objective, config.train, teacher, lambda: pairs, ())
    assert (tmp_path / "runs/prune_unet/round-00/weights.safetensors").is_file()
    assert str(pairs.folder.resolve()) == made["cache"]


@pytest.mark.slow
def test_a_pruning_job_runs_on_tars(leave, tars, tiny_model, tmp_path):
    write_tar(tmp_path / "tars/part-002.tar", {"j.png": picture("j"), "j.json": captioned("one")})
    code, stderr = leave(*JOB, "search=manual", *tars, *tiny_model, "data.heldout_fraction=0.4")
    assert code == 0, stderr
    assert json.loads((tmp_path / "runs/prune_unet/evaluation.json").read_text())


@pytest.mark.slow
def test_two_processes_cache_what_one_does(tars, tiny_model, tmp_path):
    one, two = (launch(n, tmp_path / str(n), CACHE, *tars, *tiny_model).parent / "cache" for n in (1, 2))
    made = {path.relative_to(one): path.read_bytes() for path in one.glob("*/[!.]*")}
    assert len(made) > 10 and made == {path.relative_to(two): path.read_bytes() for path in two.glob("*/[!.]*")}


USER_ERRORS = {
    "no tars": (["data=webdataset", "data.source=/nowhere/*.tar"], r"data.source: /nowhere/\*.tar names no file"),
    "no source": (["data=webdataset"], "data.source"),
    "no parquet": (["data=parquet", "data.source=/nowhere"], "data.source: /nowhere names no file"),
    "a scheme that nobody serves": (["data=webdataset", "data.source=ftpx://a/b.tar"], "ftpx://a/b.tar cannot be open"),
    "a source by number": (["data=webdataset", "data.source=5"], "data.pairs.source=5: .*string"),
    "an unknown storage": (["data.cache.dtype=int8"], "data.cache.dtype='int8' is unknown; choose from float32, float"),
    "shards of nothing": (["data.cache.shard_size=0"], "data.cache: shard_size=0 must be at least 1"),
    "a size that does not fit": (["data.resolution=18"], "18x18 px.*nearest: 16, 20"),
    "a hub that is not there": (
        ["data=hub", "data.streaming=true", "data.source=no/such"],
        "no/such.*cannot be loaded",
    ),
}


@pytest.mark.parametrize("case", USER_ERRORS)
def test_a_mistake_about_the_data_is_one_line(leave, tiny_model, tmp_path, case):
    overrides, message = USER_ERRORS[case]
    line = error_line(*leave(CACHE, *tiny_model, *overrides))
    assert re.search(message, line), line
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
