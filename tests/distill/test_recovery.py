"""Recovery: what a student that equals its teacher may not lose, and what the features are."""

import pytest
import torch

from slimstep.distill.recovery import Recovery, features_of, relative_error
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.noise_schedule import schedule_of
from tests.tiny import DENOISER, WIDTH, no_caption, tiny_pipeline


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline("v_prediction")


@pytest.fixture(scope="module")
def teacher(pipeline):
    return PrunableUNet2DConditionModel.from_unet(pipeline.unet).requires_grad_(False)


@pytest.fixture
def recovery(pipeline, teacher):
    return Recovery(DENOISER, schedule_of(pipeline.scheduler), no_caption(4), teacher)


def batch():
    draw = torch.Generator().manual_seed(0)
    return {"latents": torch.randn(3, 4, 8, 8, generator=draw), "text": torch.randn(3, 4, WIDTH, generator=draw)}


def test_the_teacher_itself_has_no_output_or_feature_loss(recovery, teacher):
    loss, metrics = recovery(teacher, batch(), torch.Generator().manual_seed(0))
    assert metrics["output"] == metrics["features"] == 0
    assert loss == metrics["denoising"] > 0


def test_a_pruned_student_learns_from_every_level(recovery, teacher):
    student = teacher.with_architecture({"mid_block.attentions.0": 0, "up_blocks.1.resnets.1": 0}).requires_grad_()
    loss, metrics = recovery(student, batch(), torch.Generator().manual_seed(0))
    assert metrics["output"] > 0 and metrics["features"] > 0
    loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("level", ["down_blocks.3", "down_blocks.2"])
def test_a_student_without_a_level_learns_from_those_that_give_what_the_teachers_give(recovery, teacher, level):
    student = teacher.with_architecture({f"down_blocks.{k}": 0 for k in range(int(level[-1]), 4)}).requires_grad_()
    loss, metrics = recovery(student, batch(), torch.Generator().manual_seed(0))
    loss.backward()
    assert 0 < metrics["features"] < torch.inf


def test_features_are_the_outputs_of_all_levels_and_the_hooks_go_again(teacher):
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 4, WIDTH)
    with features_of(teacher) as features:
        teacher(*inputs)
    levels = [*(f"down_blocks.{i}" for i in range(4)), "mid_block", *(f"up_blocks.{i}" for i in range(4))]
    assert list(features) == levels
    features.clear()
    teacher(*inputs)
    assert not features


def test_the_error_is_relative_to_the_reference():
    reference = torch.tensor([3.0, -4.0])
    assert relative_error(1000 * reference, 1000 * reference * 1.1) == pytest.approx((0.1 / 1.1) ** 2)
