"""The device that is not there, and jobs on it with a UNet of two levels."""

import sys
from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel

from slimstep.engine.launch import main
from tests.cuda_dry_run.device import cuda_dry_run
from tests.tiny import WIDTH, tiny_pipeline


def small_pipeline(prediction_type: str = "v_prediction"):
    """Two levels, each operation of a network that has four: what is fake costs a third of a millisecond each."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=WIDTH, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
    )  # fmt: skip
    return tiny_pipeline(prediction_type, unet=unet)


@pytest.fixture
def gpu():
    """The mode of a device that is not there while the test runs."""
    with cuda_dry_run() as mode:
        yield mode


@pytest.fixture(scope="session")
def small_model(tmp_path_factory, tiny_clip_folder):
    """Overrides that put small networks in the places of the shipped ones."""
    folder = tmp_path_factory.mktemp("small") / "pipeline"
    small_pipeline().save_pretrained(folder)
    model = ["model=path", f"model.name_or_path={folder}", "data.resolution=16", "data.pairs.size=16"]
    return [*model, f"scorer.model=local-dir:{tiny_clip_folder}", "scorer.force=true"]  # its zeros judge nothing


@pytest.fixture
def run(gpu, monkeypatch, small_model, tmp_path):
    """Runs an experiment on the device that is not there, in bfloat16 where nothing else is said.

    Gives its exit code and its waits.
    """

    def job(experiment: str, *overrides: str) -> tuple[int, Counter[str]]:
        words = [f"+experiment={experiment}", *small_model, f"root={tmp_path / 'runs'}", "mixed_precision=bf16",
                 f"data.cache.folder={tmp_path / 'cache'}", "debug=true"]  # fmt: skip
        named = {word.partition("=")[0] for word in overrides}
        words = [word for word in words if word.partition("=")[0] not in named]
        monkeypatch.setattr(sys, "argv", ["train.py", *words, *overrides])
        with gpu.counted() as waits, pytest.raises(SystemExit) as leaving:
            main()
        return leaving.value.code, waits

    return job
