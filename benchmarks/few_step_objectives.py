"""Which way of distilling few steps is best for its cost, and which teacher does a pruned student need?

    python benchmarks/few_step_objectives.py --root runs/objectives                  # at equal evaluations
    python benchmarks/few_step_objectives.py --root runs/objectives --seconds 400    # and then at equal seconds
    python benchmarks/few_step_objectives.py --root runs/teachers --student runs/prune_unet/export --out teachers

Every row is the distilling job on the bundled UNet, down to --steps sampling steps, evaluated on the same held-out
prompts from one noise. All spend as many evaluations of the denoiser on training: a guided row counts twice, a row with
a gradient three times. With --seconds each trains so long instead, by the seconds a step that its run at equal
evaluations took. With --student the rows are teachers of that pruned network by distribution matching: the full one,
the mean of both scores, and the pruned one. To --out go table.md, and table.json with the values of every prompt.
Started again, it continues.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.distill_table import STEPS, share_teacher
from benchmarks.launching import run_job
from slimstep.engine.console import open_console
from slimstep.engine.files import write_json, write_text
from slimstep.eval.metrics.compare import paired_difference
from slimstep.eval.monitoring import PREVIEWS
from slimstep.eval.pages.evaluation_page import spread_columns
from slimstep.eval.pages.few_step import of_point, rounded_point
from slimstep.eval.pages.tables import Table
from slimstep.eval.pages.text import difference, score
from slimstep.eval.record import Point, read_evaluation

LOOKS = 4  # at the student while it trains: the time between the first and the last is that of its steps
RANGE = "objective.guidance_range=[2,3]"
DMD = ["objective=dmd"]


@dataclass(frozen=True)
class Way:
    """How a row is trained, and the evaluations that a sample of it costs, in the mean over its stages."""

    overrides: Sequence[str]
    evaluations: float
    stages: Sequence[int] = ()  # between the teacher's steps and the student's
    drawn: int = 0  # how often samples are drawn in a step, which costs more with more sampling steps

    def grid(self, steps: int) -> list[int]:
        """Sampling steps of the teacher, and of the student of every stage."""
        return [32, *(n for n in self.stages if n > steps), steps]

    def cost(self, steps: int) -> float:
        """Evaluations of a sample, for a student of so many steps."""
        return self.evaluations + self.drawn * (steps - 1) / 2


@dataclass(frozen=True)
class Row:
    """A way that was trained: training steps, evaluations and seconds of all its stages, and what it became."""

    name: str
    training_steps: int
    evaluations: int
    seconds: float
    point: Point


# Evaluations of a sample of one step, in this order: 3 for the student's prediction with a gradient (6 guided), 2 for
# each guided one of the teacher, those without a gradient, 3 for each that trains another network or goes through the
# teacher.
OBJECTIVES = {
    "steps": Way([*STEPS, RANGE, "objective.guided_share=1"], 6 + (8 + 4 + 4 + 4) / 4, (8, 4, 2)),
    "guidance": Way(["objective=guidance", RANGE], 3 + (8 + 2 + 2 + 2) / 4, (8, 4, 2)),
    "lcm": Way(["objective=lcm", RANGE], 3 + 2 + 1),
    "scm": Way(["objective=scm"], 3 + 2 + 1),
    "dmd": Way(DMD, 3 + 2 + 2 + 2 * 3, drawn=2),
    "dmd, discriminator": Way([*DMD, "objective.adversarial_weight=1e-2"], 3 + 2 + 2 + 2 * 3 + 3 + 3, drawn=3),
    "ADD": Way(["objective=adversarial"], 3 + 2 + 3 + 3, drawn=2),
    "LADD": Way(["objective=adversarial", "objective.distillation_weight=0"], 3 + 3 + 3, drawn=2),
}


def teachers(student: str, seeds: int) -> dict[str, Way]:
    """A pruned network under the full teacher, under both, and under its own many steps; a row for each seed."""
    own = [*DMD, f"distillation.student={student}"]
    kinds = {
        "full teacher": Way(own, 13, drawn=2),
        "mixed teacher": Way([*own, "objective.teacher_mix=0.5"], 15, drawn=2),
        "pruned teacher": Way([*own, "distillation.stages={steps-1: {teacher: student}}"], 13, drawn=2),
    }
    return {
        f"{name}, seed {seed}": replace(way, overrides=[*way.overrides, f"seed={seed}"])
        for name, way in kinds.items()
        for seed in range(seeds)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/objectives"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/few-step-objectives"), help="where the results go")
    parser.add_argument("--steps", type=int, default=1, help="sampling steps of the students")
    parser.add_argument("--evaluations", type=int, default=80_000, help="of the denoiser, for every training")
    parser.add_argument("--seconds", type=float, help="of every training; its runs at equal evaluations must be there")
    parser.add_argument("--student", help="a pruned export: ask for its teacher")
    parser.add_argument("--seeds", type=int, default=3, help="of each teacher of --student")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("overrides", nargs="*", help="further overrides of the experiment, for all rows")
    options = parser.parse_args()
    ways = teachers(options.student, options.seeds) if options.student else OBJECTIVES
    if unknown := sorted(set(options.only or ()) - set(ways)):
        parser.error(f"--only {', '.join(unknown)}: choose from {', '.join(ways)}")
    rows: list[Row] = []
    for name in options.only or ways:
        steps = training_steps(name, ways[name], options)
        train(name, ways[name], steps, options, first=rows[0].name if rows else None)
        rows.append(trained(name, ways[name], steps, options))
        write_results(rows, options)


def folder(name: str, options: argparse.Namespace) -> Path:
    return options.root / f"{named(name)}{'-seconds' if options.seconds else ''}"


def named(way: str) -> str:
    return way.lower().replace(",", "").replace(" ", "-")


def training_steps(name: str, way: Way, options: argparse.Namespace) -> int:
    """Of each stage, for as many evaluations, or so many seconds."""
    stages = len(way.grid(options.steps)) - 1
    if not options.seconds:
        return round(options.evaluations / (way.cost(options.steps) * options.batch * stages))
    equal = options.root / named(name)
    if not read_evaluation(equal):
        sys.exit(f"{equal} is not finished: run without --seconds first")
    return round(options.seconds / (seconds_a_step(equal) * stages))


def seconds_a_step(run: Path) -> float:
    """The median over the times between two looks at a student, of which a pause of the run spoils one; in the mean
    over its stages."""
    stages = []
    for previews in run.glob(f"steps-*/{PREVIEWS}"):
        looks = sorted(previews.iterdir())
        times = [(look.stat().st_mtime, int(look.name.removeprefix("step-"))) for look in looks]
        stages.append(statistics.median((b - a) / (n - m) for (a, m), (b, n) in itertools.pairwise(times)))
    return statistics.mean(stages)


def train(name: str, way: Way, steps: int, options: argparse.Namespace, first: str | None) -> None:
    """Runs or continues the row's job; the teacher's images are those of the `first` row."""
    path = folder(name, options)
    if first:
        share_teacher(folder(first, options), path)
    grid = ",".join(map(str, way.grid(options.steps)))
    run_job("distill_steps", [
        f"root={options.root}", f"name={path.name}", *way.overrides, f"distillation.steps=[{grid}]",
        f"curves.steps=[{options.steps}]", "curves.guidance=[2.5]", f"train.steps={steps}",
        f"train.batch_size={options.batch}", "train.learning_rate=1e-4", "train.warmup_steps=10",
        "train.ema_decay=0.99", f"train.evaluate_every={max(1, steps // LOOKS)}", "scoring.prompts=64",
        *options.overrides,
    ])  # fmt: skip


def trained(name: str, way: Way, steps: int, options: argparse.Namespace) -> Row:
    path, total = folder(name, options), steps * (len(way.grid(options.steps)) - 1)
    evaluation = read_evaluation(path)
    assert evaluation, f"{path} has no evaluation"
    point = next(p for p in evaluation.points if p.model == f"steps-{options.steps}" and p.steps == options.steps)
    spent = round(total * options.batch * way.cost(options.steps))
    return Row(name, total, spent, total * seconds_a_step(path), point)


def write_results(rows: Sequence[Row], options: argparse.Namespace) -> None:
    first, spread = rows[0], spread_columns([row.point for row in rows])
    table = Table.of({
        "trained by": lambda row: row.name,
        "training steps": lambda row: str(row.training_steps),
        "evaluations": lambda row: f"{row.evaluations:,}",
        "seconds": lambda row: f"{row.seconds:.0f}",
        "a step": lambda row: str(row.point.facts["evaluations"] // row.point.steps),
        "CLIP ± se": lambda row: score(row.point.clip),
        "against the teacher's 32 steps": lambda row: difference(row.point.versus_reference),
        f"against {first.name}": lambda row: "–" if row is first else difference(against(row, first)),
        **{heading: partial(of_point, show) for heading, show in spread.items()},
    }, rows)  # fmt: skip
    write_text(options.out / "table.md", table.markdown)
    facts = read_evaluation(folder(first.name, options))
    kept = {key: getattr(facts, key) for key in ("prompts", "prompts_hash", "n", "protocol", "environment")}
    points = [{**asdict(row), "point": rounded_point(row.point)} for row in rows]
    write_json(options.out / "table.json", {**kept, "rows": points})
    print(table.console)


def against(row: Row, other: Row) -> Mapping[str, float]:
    return asdict(paired_difference(row.point.clip["per_prompt"], other.point.clip["per_prompt"]))


if __name__ == "__main__":
    open_console()
    main()
