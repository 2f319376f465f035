"""Do fewer steps keep the teacher's quality, and which way of distilling them is best? Schedules side by side.

    python benchmarks/distill_table.py --root runs/schedules --processes 2

Every schedule is the distilling job on the bundled model, evaluated on 192 held-out prompts from one noise. `own` takes
its time and goes down to one step; its 2-step stage learns from the 8-step one. The others train every stage equally
long: SnapFusion's p (0, 0.1, 1), its weighting by SNR beside ours, guidance-distilled students, and
latent consistency (one stage with as many training steps as the others' three together). `cut` is the teacher without
the blocks that BK-SDM's rule takes, untrained since: with recovery and without, distilled directly and progressively.
Schedules share what is the same in them: the teacher's evaluation, the stages of its own network, the recovery. To
--out go the table, pictures, and every student's evaluation per prompt. Started again, it continues.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.launching import REPOSITORY, run_job
from slimstep.engine.console import open_console
from slimstep.engine.files import whole_folder, write_json, write_text
from slimstep.engine.loop import WEIGHTS
from slimstep.eval.metrics.compare import paired_difference
from slimstep.eval.pages.figures import save_png
from slimstep.eval.pages.steps_page import curves_figure, display, distance_figure, error_ratio, number
from slimstep.eval.pages.tables import markdown_table
from slimstep.eval.pages.text import difference, ratio, score
from slimstep.eval.record import Evaluation, Point, read_evaluation
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet

TEACHER = REPOSITORY / "assets/shapes"
# BK-SDM's rule, the second of every pair of blocks, but for the innermost up level: 73 % of the UNet's time.
CUT = (
    *(f"down_blocks.{level}.resnets.1" for level in range(4)),
    *(f"down_blocks.{level}.attentions.1" for level in range(3)),
    *(f"up_blocks.{level}.resnets.1" for level in range(3)),
    *(f"up_blocks.{level}.attentions.1" for level in (1, 2)),
)
GUIDANCE = 2.5
SAMPLERS = ("teacher", "teacher-dpm")  # of the bundled UNet
COMMON = [
    f"curves.guidance=[{GUIDANCE}]", "objective.guidance_range=[2,3]", "train.warmup_steps=20",
]  # fmt: skip
# Every step counts alike, and no denoising loss beside it: by SNR the students end further away (the row "by SNR").
RELATIVE = ["objective.weighting=relative"]
STEPS = [*RELATIVE, "objective.original_weight=0"]
GRID = ["distillation.steps=[32,8,4,2]", "curves.steps=[2,4,8]"]
GUIDED = [*GRID, *STEPS, "objective.guided_share=1"]
CUT_DOWN = [*GUIDED, "distillation.student={root}/cut/export"]
SCHEDULES = {
    "own": [
        "distillation.steps=[32,8,4,2,1]", "curves.steps=[1,2,4,8]", *STEPS, "objective.guided_share=1",
        "distillation.stages={{steps-8: {{train: {{steps: {long}, learning_rate: 3e-5}}}}, "
        "steps-4: {{train: {{steps: 100}}}}, "
        "steps-2: {{teacher: steps-8, teacher_steps: 8, train: {{steps: {long}, learning_rate: 2.5e-4}}}}, "
        "steps-1: {{train: {{steps: 100}}}}}}",
    ],
    "p = 1": GUIDED,
    "p = 0.1": [*GRID, *STEPS, "objective.guided_share=0.1"],
    "p = 0": [*GRID, *STEPS, "objective.guided_share=0"],
    "p = 1, by SNR": [*GUIDED, "objective.weighting=truncated_snr"],
    "told": [*GRID, *RELATIVE, "objective=guidance"],
    "lcm": ["curves.steps=[2,4,8]", "objective=lcm", "train.steps={together}"],
    "cut": CUT_DOWN,
    "cut, repaired": [*CUT_DOWN, "distillation.recover=true"],
    "cut, repaired, progressive": [*CUT_DOWN, "distillation.recover=true", "distillation.mode=progressive"],
}  # fmt: skip
# Per schedule: stages that an earlier one has trained in the same way, and what they are called there and here.
SHARED = {
    "cut": ("p = 1", {"steps-8": "teacher-8", "steps-4": "teacher-4"}),
    "cut, repaired": ("cut", {"teacher-8": "teacher-8", "teacher-4": "teacher-4"}),
    "cut, repaired, progressive": ("cut, repaired", {"repair": "repair"}),
}
QUESTIONS = [("p = 0.1", "p = 0"), ("p = 1", "p = 0"), ("p = 1", "p = 1, by SNR"), ("told", "p = 1"), ("lcm", "told"),
             ("cut, repaired", "cut"), ("cut, repaired, progressive", "cut, repaired")]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/schedules"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/distill-table"), help="where the results go")
    parser.add_argument("--steps", type=int, default=100, help="training steps of every stage")
    parser.add_argument("--long-steps", type=int, default=800, help="of the 8- and 2-step stages of `own`")
    parser.add_argument("--batch", type=int, default=16, help="samples of a training step, over all processes")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--processes", type=int, default=1, help="more than one starts torchrun")
    parser.add_argument("--only", nargs="*", choices=SCHEDULES, default=list(SCHEDULES), help="schedules to run")
    parser.add_argument("overrides", nargs="*", help="further overrides of the experiment, for all schedules")
    options = parser.parse_args()
    write_cut(options.root / "cut")
    done = []
    for name in options.only:
        share(options.root, name, done)
        run(name, options)
        done.append(name)
        write_results(options, done)


def slug(name: str) -> str:
    return name.replace(" = ", "").replace(", ", "-")


def write_cut(folder: Path) -> None:
    """The pruned student, with the teacher's weights."""
    if (folder / "export").exists():
        return
    teacher = load_pipeline(TEACHER)
    bare = PrunableUNet2DConditionModel.from_unet(teacher.unet, skip_rule="drop_skip")
    cut = bare.with_architecture(dict.fromkeys(CUT, 0))
    export_pipeline(with_unet(teacher, cut), folder / "export")


def share(root: Path, name: str, done: Sequence[str]) -> None:
    """Puts into a run what an earlier one has made in the same way."""
    for source in done[:1]:
        share_teacher(root / slug(source), root / slug(name))
    source, stages = SHARED.get(name, (None, {}))
    for there, here in stages.items():
        copy(root / slug(source) / there / WEIGHTS, root / slug(name) / here / WEIGHTS)


def share_teacher(source: Path, there: Path) -> None:
    """Puts the evaluation of the teacher that one run has made into another run's folder."""
    for folder, pattern in {"evaluation": "teacher*", "reference": "*", "images": "teacher*"}.items():
        for path in sorted((source / folder).glob(pattern)):
            copy(path, there / folder / path.name)


def copy(source: Path, there: Path) -> None:
    if there.exists():
        return
    there.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        with whole_folder(there) as aside:
            shutil.copytree(source, aside, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, there)


def run(name: str, options: argparse.Namespace) -> None:
    batch = options.batch // options.processes
    values = {"root": options.root, "together": 3 * options.steps, "long": options.long_steps}
    own = [word.format(**values) for word in SCHEDULES[name]]
    overrides = [
        f"root={options.root}", f"name={slug(name)}", f"train.steps={options.steps}", f"train.batch_size={batch}",
        f"recovery.train.steps={2 * options.steps}", f"recovery.train.batch_size={batch}",
        f"train.learning_rate={options.learning_rate}", *COMMON, *own, *options.overrides,
    ]  # fmt: skip
    run_job("distill_steps", overrides, options.processes)


def write_results(options: argparse.Namespace, names: Sequence[str]) -> None:
    """The table, the pictures and the evaluations of the schedules that are finished."""
    evaluations = {name: read_evaluation(options.root / slug(name)) for name in names}
    first = evaluations[names[0]]
    teachers = [point for point in first.points if point.model in SAMPLERS]
    students = [point for name, evaluation in evaluations.items() for point in schedule_points(name, evaluation)]
    points = [*teachers, *students]
    header = ["schedule", "steps", "UNet evaluations", "CLIP ± se", "against the teacher's 32 steps", "latent error",
              "over DDIM's", "over DPM++ 2M's"]  # fmt: skip
    table = markdown_table(header, [cells(point, points) for point in points])
    asked = ["A", "against B", "steps", "CLIP, A − B", "latent error, A / B"]
    answers = markdown_table(asked, [row for pair in QUESTIONS for row in answer(students, *pair)])
    write_text(options.out / "table.md", f"{table}\n{answers}")
    save_png(curves_figure(points, "steps", "sampling steps"), options.out / "clip-against-steps.png")
    save_png(distance_figure(points), options.out / "distance-against-steps.png")
    facts = {key: getattr(first, key) for key in ("prompts", "prompts_hash", "n", "protocol", "environment")}
    write_json(options.out / "points.json", {**facts, "points": [rounded(point, points) for point in points]})
    print(table, answers, sep="\n")


def schedule_points(name: str, evaluation: Evaluation) -> list[Point]:
    """Every student at the number of steps that it was made for; a consistency student at all."""
    return [
        replace(point, model=name)
        for point in evaluation.points
        if point.model.startswith("steps-") and (name == "lcm" or point.model == f"steps-{point.steps}")
    ]


def over_samplers(point: Point, points: Sequence[Point]) -> dict[str, dict | None]:
    """The latent error in units of the teacher's own at as many steps, by each of its samplers."""
    others = {p.model: p for p in points if p.model in SAMPLERS and p.key[1:] == point.key[1:]}
    return {name: error_ratio(point, others.get(name)) for name in SAMPLERS}


def cells(point: Point, points: Sequence[Point]) -> list[str]:
    return [
        display(point.model), str(point.steps), str(point.facts["evaluations"]),
        score(point.clip), difference(point.versus_reference), number(point, "latent_error", ".4f"),
        *map(ratio, over_samplers(point, points).values()),
    ]  # fmt: skip


def answer(points: Sequence[Point], a: str, b: str) -> list[list[str]]:
    """Two schedules prompt by prompt, at every number of steps that both have."""
    rows, of = [], {(p.model, p.steps): p for p in points}
    for steps in sorted({p.steps for p in points}, reverse=True):
        if (a, steps) in of and (b, steps) in of:
            one, other = of[a, steps], of[b, steps]
            versus = vars(paired_difference(one.clip["per_prompt"], other.clip["per_prompt"]))
            rows.append([a, b, str(steps), difference(versus), ratio(error_ratio(one, other))])
    return rows


def rounded(point: Point, points: Sequence[Point]) -> dict:
    """A point with its values per prompt to what matters, for a file that is kept, and its latent error in units of the
    teacher's."""
    metrics = {name: own and {**own, "per_prompt": [round(value, 6) for value in own.get("per_prompt") or ()]}
               for name, own in point.metrics.items()}  # fmt: skip
    return {**asdict(point), "metrics": metrics, "latent_error_over": over_samplers(point, points)}


if __name__ == "__main__":
    open_console()
    main()
