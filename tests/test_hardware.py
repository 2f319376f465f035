"""The hardware group and accelerate's files beside it: every experiment takes them, and accelerate reads them."""

import json
import sys
from pathlib import Path

import hydra
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from omegaconf import OmegaConf

import slimstep.engine.launch  # noqa: F401  registers the resolvers
from slimstep.engine.checked import CONFIGS
from tests.user_errors import error_line

HARDWARE = sorted(path.stem for path in (CONFIGS / "hardware").glob("*.yaml"))
TRAINING = ("prune_unet", "prune_vae", "distill_steps")


def test_every_hardware_has_a_file_of_accelerate():
    assert sorted(path.stem for path in (CONFIGS / "accelerate").glob("*.yaml")) == HARDWARE


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("experiment", TRAINING)
def test_an_experiment_composes_with_it_and_the_command_line_wins(hardware, experiment):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        options = [f"+experiment={experiment}", f"+hardware={hardware}", "train.batch_size=3"]
        config = hydra.compose("train", options)
    OmegaConf.to_object(config.train)  # the values check themselves
    assert config.mixed_precision == ("no" if hardware == "deepspeed" else "bf16") and config.train.batch_size == 3
    assert not config.recovery.train.compile  # it reads features with hooks


@pytest.mark.parametrize("hardware", HARDWARE)
def test_accelerate_reads_its_file(hardware):
    config = load_config_from_file(str(CONFIGS / f"accelerate/{hardware}.yaml"))
    assert config.num_processes in (1, 8, 16)
    if hardware == "deepspeed":
        assert json.loads((CONFIGS.parent / config.deepspeed_config["deepspeed_config_file"]).read_text())
    else:
        assert config.mixed_precision == "bf16"


@pytest.mark.parametrize("folder", ["hardware", "accelerate"])
@pytest.mark.parametrize("hardware", HARDWARE)
def test_every_file_says_what_was_run_and_what_not(folder, hardware):
    text = Path(CONFIGS / f"{folder}/{hardware}.yaml").read_text()
    assert "# Run: " in text and "Not run: " in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.optimizer=lion"], "train.optimizer='lion' is unknown; choose from"),
        (["train.optimizer=adamw8bit"], "train.optimizer=adamw8bit needs torchao: pip install"),
        (["mixed_precision=fp16"], "mixed_precision=fp16 needs a GPU"),
        (["mixed_precision=half"], "mixed_precision='half' is unknown; choose from"),
        (["+hardware=tpu"], "options in 'hardware': a100x8"),
    ],
    ids=["an unknown optimiser", "8 bits without torchao", "fp16 on a CPU", "an unknown precision", "no such hardware"],
)
@pytest.mark.parametrize("experiment", TRAINING)
def test_what_cannot_be_is_reported_in_a_line(leave, tiny_model, monkeypatch, experiment, overrides, message):
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert message in error_line(*leave(f"+experiment={experiment}", *tiny_model, *overrides))
