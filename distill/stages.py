"""The stages of a progressive distillation: which network learns which number of steps from which."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slimstep.distill.config import StageChanges


@dataclass(frozen=True)
class DistillationStage:
    """One stage. `teacher` and `start` name networks: "teacher", "student", or an earlier stage."""

    name: str
    teacher: str
    start: str
    teacher_steps: int
    steps: int


def distillation_stages(
    steps: Sequence[int], mode: str, same_network: bool, one_teacher: bool = False
) -> tuple[DistillationStage, ...]:
    """The stages in the order in which they are trained.

    Direct: a network of the teacher's architecture is distilled beside the student, one stage ahead, and teaches it; it
    stops one stage earlier, where it has nothing left to teach. With `same_network` the student has the teacher's
    network, and both modes give the same stages. With `one_teacher` the teacher with its many steps teaches all.
    """
    stages: list[DistillationStage] = []
    teacher, student = "teacher", "student"
    beside = mode == "direct" and not same_network and not one_teacher
    for number, (above, below) in enumerate(itertools.pairwise(steps), start=2):
        if beside and number < len(steps):
            stages.append(DistillationStage(f"teacher-{below}", teacher, teacher, above, below))
        stages.append(DistillationStage(f"steps-{below}", teacher, student, steps[0] if one_teacher else above, below))
        student = f"steps-{below}"
        if not one_teacher:
            teacher = f"teacher-{below}" if beside else student
    return tuple(stages)


def with_changes(
    stages: Sequence[DistillationStage], changes: Mapping[str, StageChanges]
) -> tuple[DistillationStage, ...]:
    """The stages, some with another teacher or start. ValueError for unknown names, and for those of later stages."""
    names = [stage.name for stage in stages]
    if unknown := sorted(set(changes) - set(names)):
        raise ValueError(f"distillation.stages names {unknown}; this distillation has {names}")
    changed = []
    for place, stage in enumerate(stages):
        change, existing = changes.get(stage.name, StageChanges()), ["teacher", "student", *names[:place]]
        requested = {"teacher": change.teacher, "start": change.start, "teacher_steps": change.teacher_steps}
        for key in ("teacher", "start"):
            if requested[key] is not None and requested[key] not in existing:
                raise ValueError(f"distillation.stages.{stage.name}.{key}={requested[key]} is none of {existing}")
        changed.append(replace(stage, **{key: value for key, value in requested.items() if value is not None}))
    return tuple(changed)
