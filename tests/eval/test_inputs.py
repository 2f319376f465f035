"""What jobs begin with, and where frozen networks lie, and in which precision, while something trains."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from omegaconf import OmegaConf

from slimstep.eval.inputs import Teacher, read_prompt_set
from slimstep.eval.training import compute_copy, offloaded
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.pipeline import with_unet
from slimstep.models.sizes import set_resolution
from tests.tiny import tiny_pipeline, tiny_unet


def teacher_in(precision: str) -> Teacher:
    places = {"device": torch.device("cpu"), "distributed_type": DistributedType.NO}
    accelerator = SimpleNamespace(mixed_precision=precision, **places)
    pipeline = tiny_pipeline(unet=PrunableUNet2DConditionModel.from_unet(tiny_unet()))
    return Teacher(pipeline, None, SimpleNamespace(accelerator=accelerator))


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_a_frozen_teacher_is_cast_once_to_what_is_computed_in(precision, dtype):
    teacher = teacher_in(precision)
    copied = compute_copy(teacher.unet, teacher)
    assert copied.dtype == dtype and teacher.unet.dtype == torch.float32
    assert (copied is teacher.unet) == (dtype == torch.float32)  # nothing is copied in vain


def test_idle_networks_lie_on_the_cpu_and_come_back(monkeypatch):
    places, network = [], torch.nn.Linear(1, 1, device="meta")
    monkeypatch.setattr(network, "to", lambda place: places.append(str(place)))
    with pytest.raises(KeyError), offloaded([network]):
        assert places == ["cpu"]
        raise KeyError
    assert places == ["cpu", "meta"]


def test_a_resolution_below_the_models_own_lasts_for_weights_of_old_diffusers():
    pipeline = tiny_pipeline()
    pipeline.unet.register_to_config(_diffusers_version="0.6.0")
    set_resolution(pipeline, 8)
    for remade in (pipeline, with_unet(pipeline, pipeline.unet)):
        assert remade.unet.config.sample_size == 4


def test_prompts_come_from_the_column_that_is_named(tmp_path):
    (tmp_path / "drawbench.csv").write_text("Prompts,Category\na red car,Colors\ntwo dogs,Counting\n")
    file = {"prompt_file": str(tmp_path / "drawbench.csv"), "prompt_column": None}
    config = OmegaConf.create({"data": file})
    with pytest.raises(ValueError, match="name the one to use, data.prompt_column=…, its columns are Prompts, Cat"):
        read_prompt_set(config)
    config.data.prompt_column = "Prompts"
    assert read_prompt_set(config).prompts == ("a red car", "two dogs")
    config.data.prompt_file = None
    with pytest.raises(ValueError, match="data.prompt_column=Prompts is of data.prompt_file, and none is given"):
        read_prompt_set(config)


@pytest.mark.parametrize("group", sorted(path.stem for path in Path("configs/data").glob("*.yaml")))
def test_every_group_of_data_has_the_keys_that_jobs_read(group):
    data = OmegaConf.load(f"configs/data/{group}.yaml")
    assert {"prompt_file", "prompt_column", "resolution", "cache"} <= set(data)
