"""The ladder of a distillation: which network learns which number of steps from which."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slimstep.distill.config import RungConfig


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


def climbed_otherwise(rungs: Sequence[Climb], changes: Mapping[str, RungConfig]) -> tuple[Climb, ...]:
    """The rungs, some with another teacher or start. ValueError for names that are not there, or not yet."""
    names = [climb.name for climb in rungs]
    if unknown := sorted(set(changes) - set(names)):
        raise ValueError(f"ladder.rungs names {unknown}; this ladder has {names}")
    climbed = []
    for place, climb in enumerate(rungs):
        own, there = changes.get(climb.name, RungConfig()), ["teacher", "student", *names[:place]]
        asked = {"teacher": own.teacher, "start": own.start, "teacher_steps": own.teacher_steps}
        for key in ("teacher", "start"):
            if asked[key] is not None and asked[key] not in there:
                raise ValueError(f"ladder.rungs.{climb.name}.{key}={asked[key]} is none of {there}")
        climbed.append(replace(climb, **{key: value for key, value in asked.items() if value is not None}))
    return tuple(climbed)
