"""The ladder of a distillation: which network learns which number of steps from which."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Climb:
    """One rung. `teacher` and `start` name networks: "teacher", "student", or an earlier rung."""

    name: str
    teacher: str
    start: str
    teacher_steps: int
    steps: int


def climbs(steps: Sequence[int], mode: str, own_network: bool) -> tuple[Climb, ...]:
    """The rungs in the order in which they are made.

    Direct: the teacher's architecture climbs down beside the student's, and teaches it; it stops one rung above, where
    it has nothing left to teach. Where the student has the teacher's network the two ladders, and both modes, are one.
    """
    rungs: list[Climb] = []
    teacher, student = "teacher", "student"
    beside = mode == "direct" and not own_network
    for rung, (above, below) in enumerate(itertools.pairwise(steps), start=2):
        if beside and rung < len(steps):
            rungs.append(Climb(f"teacher-{below}", teacher, teacher, above, below))
        rungs.append(Climb(f"steps-{below}", teacher, student, above, below))
        student = f"steps-{below}"
        teacher = f"teacher-{below}" if beside else student
    return tuple(rungs)
