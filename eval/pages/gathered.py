"""What several finished runs say together: points with comparable scores, and the times that belong to them."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from slimstep.eval.pages.pareto import Condition, Key, Timing, join, key, shown_conditions
from slimstep.eval.pages.results import ResultRun, Results, Row, gather, read_results
from slimstep.eval.pages.runs import run_names
from slimstep.eval.record import Evaluation


class Gathered:
    """Runs by their folders' names; the first evaluation's scores are those that others are compared with."""

    def __init__(self, folders: Sequence[str | Path]):
        runs = [read_results(folder) for folder in folders]
        self.runs: dict[str, ResultRun] = dict(zip(run_names([run.path for run in runs]), runs, strict=True))

    def of_kind(self, kind: str) -> dict[str, Results]:
        return {name: run.results for name, run in self.runs.items() if run.kind == kind}

    @cached_property
    def evaluations(self) -> dict[str, Evaluation]:
        return self.of_kind("evaluation")

    @cached_property
    def points(self) -> list[Row]:
        """Every model at every setting of all evaluations."""
        return gather(self.evaluations) if self.evaluations else []

    @cached_property
    def compared(self) -> list[Row]:
        """Those whose scores are of the first evaluation's metric."""
        return [point for point in self.points if point.compared]

    @cached_property
    def reference(self) -> Row:
        """The first evaluation's reference, at the first guidance scale where it was timed, if it was."""
        first = next(iter(self.evaluations.values()))
        references = [point for point in self.points if first.is_reference(point)]
        return next((point for point in references if self.time(point)), references[0])

    def reference_of(self, point: Row) -> Key:
        """What the point's score is compared with."""
        return self.reference.label, point.guidance, self.reference.steps

    # ---- times ----

    @cached_property
    def timings(self) -> dict[Condition, dict[Key, Timing]]:
        return join(self.compared, self.of_kind("benchmark"))

    @cached_property
    def conditions(self) -> list[Condition]:
        """Those with a picture; tables and sentences are of the first."""
        return shown_conditions(self.timings)

    @property
    def timed(self) -> Mapping[Key, Timing]:
        return self.timings[self.conditions[0]] if self.conditions else {}

    def time(self, point: Row) -> Timing | None:
        return self.timed.get(key(point))

    def reference_time(self, point: Row) -> Timing | None:
        return self.timed.get(self.reference_of(point))
