"""Who learns from whom."""

import pytest

from slimstep.distill.config import DistillationConfig, StageChanges
from slimstep.distill.stages import DistillationStage, distillation_stages, with_changes


def test_snapfusions_stages_for_a_student_with_another_network():
    assert distillation_stages([32, 16, 8], "direct", same_network=False) == (
        DistillationStage("teacher-16", teacher="teacher", start="teacher", teacher_steps=32, steps=16),
        DistillationStage("steps-16", teacher="teacher", start="student", teacher_steps=32, steps=16),
        DistillationStage("steps-8", teacher="teacher-16", start="steps-16", teacher_steps=16, steps=8),
    )


def test_progressively_the_student_of_every_stage_teaches_the_next():
    assert distillation_stages([32, 16, 8], "progressive", same_network=False) == (
        DistillationStage("steps-16", teacher="teacher", start="student", teacher_steps=32, steps=16),
        DistillationStage("steps-8", teacher="steps-16", start="steps-16", teacher_steps=16, steps=8),
    )


@pytest.mark.parametrize("mode", ["direct", "progressive"])
def test_with_the_teachers_network_both_modes_give_the_same_stages(mode):
    stages = distillation_stages([8, 4, 2, 1], mode, same_network=True)
    assert [stage.name for stage in stages] == ["steps-4", "steps-2", "steps-1"]
    assert [stage.teacher for stage in stages] == ["teacher", "steps-4", "steps-2"]
    assert [stage.start for stage in stages] == ["student", "steps-4", "steps-2"]


@pytest.mark.parametrize("steps", [[8], [8, 16], [32, 12], [4, 0], [8, 8]])
def test_a_step_schedule_goes_down_by_whole_numbers(steps):
    with pytest.raises(ValueError, match="must go down"):
        DistillationConfig(steps=steps)


def test_a_stage_may_have_another_teacher_and_start():
    stages = distillation_stages([32, 16, 8], "progressive", same_network=False)
    changes = {"steps-8": StageChanges(teacher="teacher", teacher_steps=32, start="student")}
    assert with_changes(stages, changes) == (
        stages[0], DistillationStage("steps-8", teacher="teacher", start="student", teacher_steps=32, steps=8)
    )  # fmt: skip
    with pytest.raises(ValueError, match="start=steps-8 is none of"):
        with_changes(stages, {"steps-16": StageChanges(start="steps-8")})
