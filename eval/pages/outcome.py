"""What became of a teacher: every stage's artifact and the student, their scores and times, in tables and words.

An evaluation gives the scores and a benchmark of the same models the times; the first model is the teacher, the last
one the student.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from slimstep.eval.metrics.compare import paired_difference
from slimstep.eval.pages.evaluation_page import images_figure
from slimstep.eval.pages.gathered import Gathered
from slimstep.eval.pages.results_figures import draw_time
from slimstep.eval.pages.speed_page import rows_that_ran
from slimstep.eval.pages.tables import Table
from slimstep.eval.pages.text import count, difference, percent, ratio, score, tile
from slimstep.eval.record import Point


class Outcome:
    """What became of the teacher, by stage. ValueError where the two runs are not about the same models."""

    def __init__(self, evaluation: str, benchmark: str):
        self.folder = Path(evaluation)
        self.runs = Gathered([evaluation, benchmark])
        (self.evaluation,), (self.benchmark,) = (
            self.runs.of_kind(kind).values() or [None] for kind in ("evaluation", "benchmark")
        )
        if not self.evaluation or not self.benchmark:
            raise ValueError(f"{evaluation} must hold an evaluation, and {benchmark} a benchmark")
        self.check()
        self.teacher, *_, self.student_name = self.evaluation.models

    def check(self) -> None:
        """ValueError where the benchmark has other models than the evaluation, or not the teacher and the student."""
        evaluated, timed = self.evaluation.models, self.benchmark["models"]
        ends = {*list(evaluated)[:1], *list(evaluated)[-1:]}
        agree = ends <= set(timed) <= set(evaluated) and all(timed[m] == evaluated[m] for m in timed)
        if len(evaluated) < 2 or not agree:
            raise ValueError(f"a benchmark of {timed} does not belong to an evaluation of {evaluated}")

    @cached_property
    def points(self) -> list[Point]:
        """At the first guidance scale: the teacher at each of its steps, then every artifact."""
        first = self.evaluation.points[0].guidance
        return [point for point in self.evaluation.points if point.guidance == first]

    @cached_property
    def teachers(self) -> list[Point]:
        return [point for point in self.points if point.model == self.teacher]

    @cached_property
    def student(self) -> Point:
        return next(point for point in self.points if point.model == self.student_name)

    def row(self, point: Point) -> Mapping[str, Any] | None:
        """How long the point takes, in the setup that the teacher is timed in; None where it was not timed."""
        base, target = self.benchmark["protocol"]["base"], (point.model, point.steps)
        rows = (row for row in rows_that_ran(self.benchmark) if row["setup"] == base)
        return next((row for row in rows if (row["model"], row["steps"]) == target), None)

    def faster(self, point: Point, teacher: Point) -> Mapping[str, float] | None:
        """How many times as fast a point is as the teacher at one of its steps."""
        row = self.row(point)
        return row and row["speedup"].get(f"{self.teacher}, {teacher.steps} steps")

    # ---- tables ----

    @property
    def against(self) -> Table:
        """The student beside the teacher at each of its numbers of steps."""
        header = ["teacher at", "its CLIP ± se", "student − teacher, paired [95 %]", "times as fast [95 %]"]
        return Table(header, [[f"{t.steps} steps", score(t.clip), difference(self.versus(self.student, t)),
                               ratio(self.faster(self.student, t))] for t in self.teachers])  # fmt: skip

    @property
    def artifacts(self) -> Table:
        """The teacher at each of its steps, then what every stage made."""
        most = f"{self.teachers[0].steps} steps"
        header = ["model", "steps", "denoiser", "decoder", "CLIP ± se", f"against {most}, paired [95 %]", "ms an image",
                  f"× {most} [95 %]"]  # fmt: skip
        return Table(header, list(map(self.artifact_row, self.points)), labels=2)

    def artifact_row(self, point: Point) -> list[str]:
        row, most, parameters = self.row(point), self.teachers[0], point.facts["parameters"]
        versus = None if point is most else self.versus(point, most)
        ms = f"{row['ms']['median'] / row['batch']:.0f}" if row else "–"
        return [point.model, str(point.steps), count(parameters["UNet"]), count(parameters["decoder"]),
                score(point.clip), difference(versus), ms, ratio(self.faster(point, most))]  # fmt: skip

    @staticmethod
    def versus(point: Point, other: Point) -> dict[str, Any]:
        return asdict(paired_difference(point.clip["per_prompt"], other.clip["per_prompt"]))

    # ---- words ----

    def results(self) -> list[str]:
        """For a model card: the student's score, and what it is beside the teacher at each of its numbers of steps."""
        student, n, where = self.student, self.evaluation.n, self.benchmark["environment"]["device"]
        lines = [f"CLIP score {score(student.clip)} on {n} prompts"]
        for t in self.teachers:
            line = f"against {t.steps} steps of the teacher: CLIP {difference(self.versus(student, t))}, paired"
            lines.append(f"{line}; {ratio(self.faster(student, t))} times as fast an image")
        row = self.row(student)
        return [*lines, *([f"{row['ms']['median']:.0f} ms an image on {where}"] if row else [])]

    def sentence(self) -> str:
        """The outcome, against the teacher's second number of steps where it has several."""
        teacher, student = self.teachers[min(1, len(self.teachers) - 1)], self.student
        share = percent(student.facts["parameters"]["UNet"] / teacher.facts["parameters"]["UNet"])
        faster, versus = self.faster(student, teacher), self.versus(student, teacher)
        times = f"{faster['ratio']:.1f} times as fast" if faster else "not timed"
        return (
            f"With {share} of the denoiser's parameters and {student.steps} steps the student draws an image {times} "
            f"as the teacher with {teacher.steps}; CLIP {difference(versus)}, paired over {versus['n']} prompts."
        )

    def tiles(self) -> list[dict[str, str]]:
        """Label, value, explanation: the large numbers of the page."""
        clip, steps, n = self.student.clip, self.student.steps, self.evaluation.n
        shown = [tile(f"CLIP, student, {steps} steps", f"{clip['mean']:.2f}", f"± {clip['se']:.2f}, {n} prompts")]
        for teacher in self.teachers:
            value, interval = difference(self.versus(self.student, teacher)).split(" ", 1)
            shown.append(tile(f"CLIP against {teacher.steps} steps", value, f"95 %: {interval}"))
            if faster := self.faster(self.student, teacher):
                value, interval = ratio(faster).split(" ", 1)
                shown.append(tile(f"speed against {teacher.steps} steps", f"{value}×", f"95 %: {interval}"))
        return shown

    def summary(self) -> dict[str, Any]:
        """What a program wants to know."""
        student, teachers = self.student, self.teachers
        against = [
            {
                "steps": teacher.steps,
                "clip": without_prompts(teacher),
                "difference": self.versus(student, teacher),
                "speedup": self.faster(student, teacher),
            }
            for teacher in teachers
        ]
        summary = {"steps": student.steps, "clip": without_prompts(student), "parameters": student.facts["parameters"]}
        return {"student": summary, "against": against}

    def figures(self) -> dict[str, Figure]:
        drawn = [draw_time(self.runs, condition) for condition in self.runs.conditions]
        pictures = {picture.name: picture.figure for picture in drawn}
        return pictures | ({"images": images_figure(self.folder, self.evaluation)} if self.evaluation.shown else {})


def without_prompts(point: Point) -> dict[str, float]:
    return {key: point.clip[key] for key in ("mean", "se")}
