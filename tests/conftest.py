"""Every test runs on the CPU, one thread, without a network; set before anything is imported."""

import gc
import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}

import pytest
import torch

import slimstep.configs.schema  # noqa: F401  the keys of all jobs
from slimstep.engine.launch import main
from tests.elsewhere import processes_elsewhere
from tests.photos import photo_folder  # noqa: F401
from tests.tiny import small_pipeline, tiny_pipeline, write_random_inception, write_tiny_clip


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not walk through it again and again, half a second each
    time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory):
    """A random v-prediction pipeline with a UNet of two levels as a diffusers folder."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory):
    """A random v-prediction pipeline of SD-1.5's topology, which single files have, as a diffusers folder."""
    folder = tmp_path_factory.mktemp("sd15") / "pipeline"
    tiny_pipeline("v_prediction").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory):
    """A random open_clip model as a local folder."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    write_tiny_clip(folder)
    return folder


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """InceptionV3 as torch-fidelity has it, with random weights."""
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    write_random_inception(library.FeatureExtractorInceptionV3, file)
    return file


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """Runs programs in processes that have diffusers and not this project (tests/elsewhere.py)."""
    with processes_elsewhere(tmp_path_factory.mktemp("elsewhere") / "modules") as run:
        yield run


@pytest.fixture(scope="session")
def tiny_model(tiny_pipeline_folder, tiny_clip_folder):
    """Overrides that put the random model and scorer in the places of the shipped ones."""
    model = ["model=path", f"model.name_or_path={tiny_pipeline_folder}", "data.resolution=16"]
    return [*model, f"scorer.model=local-dir:{tiny_clip_folder}", "scorer.force=true"]


@pytest.fixture
def leave(monkeypatch, capfd, tmp_path):
    """Runs the command line, named like the experiment where it names nothing; its exit code and its stderr."""

    def run(*overrides):
        named = [word for word in overrides if word.startswith("+experiment=") and "-m" not in overrides]
        name = [f"name={named[0].partition('=')[2]}"] if named and named[0] != "+experiment=snapfusion" else []
        monkeypatch.setattr(sys, "argv", ["train.py", f"root={tmp_path / 'runs'}", *name, *overrides])
        with pytest.raises(SystemExit) as leaving:
            main()
        return leaving.value.code, capfd.readouterr().err

    return run
