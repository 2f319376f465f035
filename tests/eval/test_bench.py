"""What every job works with: where frozen networks lie, and in which precision, while something trains."""

from types import SimpleNamespace

import pytest
import torch

from eval.bench import Bench
from models.unet import PrunableUNet2DConditionModel
from tests.tiny import tiny_unet


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_a_frozen_teacher_is_cast_once_to_what_is_computed_in(precision, dtype):
    accelerator = SimpleNamespace(mixed_precision=precision, device=torch.device("cpu"))
    bench = Bench(None, SimpleNamespace(accelerator=accelerator))
    teacher = PrunableUNet2DConditionModel.from_unet(tiny_unet())
    working = bench.working(teacher)
    assert working.dtype == dtype and teacher.dtype == torch.float32
    assert (working is teacher) == (dtype == torch.float32)  # nothing is copied in vain
