"""What every job works with: where frozen networks lie, and in which precision, while something trains."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from omegaconf import OmegaConf

from slimstep.distill.bench import DistillBench
from slimstep.eval.bench import Bench
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.pipeline import with_unet
from slimstep.models.sizes import set_resolution
from tests.tiny import tiny_pipeline, tiny_unet


def bench_in(precision: str) -> Bench:
    places = {"device": torch.device("cpu"), "distributed_type": DistributedType.NO}
    accelerator = SimpleNamespace(mixed_precision=precision, **places)
    bench = Bench(None, SimpleNamespace(accelerator=accelerator))
    bench.pipeline = tiny_pipeline(unet=PrunableUNet2DConditionModel.from_unet(tiny_unet()))
    return bench


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_a_frozen_teacher_is_cast_once_to_what_is_computed_in(precision, dtype):
    bench = bench_in(precision)
    teacher = bench.teacher
    working = bench.working(teacher)
    assert working.dtype == dtype and teacher.dtype == torch.float32
    assert (working is teacher) == (dtype == torch.float32)  # nothing is copied in vain


def test_full_weights_rest_where_a_copy_of_them_teaches():
    bench, whole = bench_in("bf16"), bench_in("no")
    assert bench.teacher not in bench.idle  # nothing is copied yet
    assert bench.working_teacher is not bench.teacher and bench.teacher in bench.idle
    assert whole.working_teacher is whole.teacher and whole.teacher not in whole.idle


def test_what_judges_rests_as_well():
    bench = bench_in("no")
    assert bench.pipeline.vae in bench.idle and bench.pipeline.text_encoder in bench.idle
    bench.scorer = SimpleNamespace(model=torch.nn.Linear(1, 1))
    assert bench.scorer.model in bench.idle and bench.teacher not in bench.idle


def test_the_ladders_teacher_rests_where_another_network_teaches():
    bench = bench_in("no")
    ladder = object.__new__(DistillBench)
    vars(ladder).update(vars(bench))
    for teaching, rests in ((None, False), (bench.teacher, False), (tiny_unet(), True)):
        ladder.teaching = teaching
        assert (bench.teacher in ladder.idle) == rests


def test_a_resolution_below_the_models_own_lasts_for_weights_of_old_diffusers():
    pipeline = tiny_pipeline()
    pipeline.unet.register_to_config(_diffusers_version="0.6.0")
    set_resolution(pipeline, 8)
    for remade in (pipeline, with_unet(pipeline, pipeline.unet)):
        assert remade.unet.config.sample_size == 4


def test_prompts_come_from_the_column_that_is_named(tmp_path):
    (tmp_path / "drawbench.csv").write_text("Prompts,Category\na red car,Colors\ntwo dogs,Counting\n")
    file = {"prompt_file": str(tmp_path / "drawbench.csv"), "prompt_column": None}
    bench = Bench(OmegaConf.create({"data": file}), SimpleNamespace(accelerator=SimpleNamespace(device="cpu")))
    with pytest.raises(ValueError, match="name the one to use, data.prompt_column=…, its columns are Prompts, Cat"):
        bench.given_prompts()
    bench.config.data.prompt_column = "Prompts"
    assert bench.given_prompts().prompts == ("a red car", "two dogs")
    bench.config.data.prompt_file = None
    with pytest.raises(ValueError, match="data.prompt_column=Prompts is of data.prompt_file, and none is given"):
        bench.given_prompts()


@pytest.mark.parametrize("group", sorted(path.stem for path in Path("configs/data").glob("*.yaml")))
def test_every_group_of_data_has_the_keys_that_jobs_read(group):
    data = OmegaConf.load(f"configs/data/{group}.yaml")
    assert {"prompt_file", "prompt_column", "resolution", "cache"} <= set(data)
