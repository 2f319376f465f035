"""Who learns from whom."""

import pytest

from slimstep.distill.config import LadderConfig, RungConfig
from slimstep.distill.ladder import Climb, climbed_otherwise, climbs


def test_snapfusions_ladder_for_a_student_with_a_network_of_its_own():
    assert climbs([32, 16, 8], "direct", own_network=False) == (
        Climb("teacher-16", teacher="teacher", start="teacher", teacher_steps=32, steps=16),
        Climb("steps-16", teacher="teacher", start="student", teacher_steps=32, steps=16),
        Climb("steps-8", teacher="teacher-16", start="steps-16", teacher_steps=16, steps=8),
    )


def test_progressively_every_rung_is_taught_by_the_one_above():
    assert climbs([32, 16, 8], "progressive", own_network=False) == (
        Climb("steps-16", teacher="teacher", start="student", teacher_steps=32, steps=16),
        Climb("steps-8", teacher="steps-16", start="steps-16", teacher_steps=16, steps=8),
    )


@pytest.mark.parametrize("mode", ["direct", "progressive"])
def test_with_the_teachers_network_both_ladders_are_one(mode):
    rungs = climbs([8, 4, 2, 1], mode, own_network=True)
    assert [rung.name for rung in rungs] == ["steps-4", "steps-2", "steps-1"]
    assert [rung.teacher for rung in rungs] == ["teacher", "steps-4", "steps-2"]
    assert [rung.start for rung in rungs] == ["student", "steps-4", "steps-2"]


@pytest.mark.parametrize("steps", [[8], [8, 16], [32, 12], [4, 0], [8, 8]])
def test_a_ladder_goes_down_by_whole_numbers(steps):
    with pytest.raises(ValueError, match="must go down"):
        LadderConfig(steps=steps)


def test_a_rung_may_be_taught_and_started_otherwise():
    rungs = climbs([32, 16, 8], "progressive", own_network=False)
    changes = {"steps-8": RungConfig(teacher="teacher", teacher_steps=32, start="student")}
    assert climbed_otherwise(rungs, changes) == (
        rungs[0], Climb("steps-8", teacher="teacher", start="student", teacher_steps=32, steps=8)
    )  # fmt: skip
    with pytest.raises(ValueError, match="start=steps-8 is none of"):
        climbed_otherwise(rungs, {"steps-16": RungConfig(start="steps-8")})
