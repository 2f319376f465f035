"""An export as a model hub shows it: the model card grown full from the run that made it, and a grid of samples."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from omegaconf import OmegaConf
from PIL import Image

from slimstep.engine.artifacts import CARD
from slimstep.engine.files import load_json, whole_folder, write_json, write_text
from slimstep.eval.pages.evaluation_page import spread_columns
from slimstep.eval.pages.tables import Table
from slimstep.eval.pages.text import difference, score
from slimstep.eval.record import Evaluation, Point, read_evaluation
from slimstep.models.card import EXPORT_REPORT, HUB_ID, Origin, origin_of

SAMPLES, SAMPLED, MARGIN = "samples.png", 4, 4  # the grid, its columns, pixels between pictures
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".h5", ".msgpack")
LOADED_FROM = re.compile(r'from_pretrained\("[^"]*"')
PLACE = "THIS_FOLDER"  # what a card that lies in a run calls the folder it is loaded from


def ready_folder(export: Path, folder: Path, repo: str, licence: str | None = None) -> None:
    """Writes a copy of `export`, a folder in a run, that is ready for the hub as `repo`, into a new or empty folder.
    ValueError where there is something else, and for an export that is none of ours, lies in no run, or holds weights
    that are no safetensors."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something already; name a new folder")
    if (origin := origin_of(export)) is None:
        raise ValueError(f"{export} is no export of slimstep's: it has no export_report.json that names its teacher")
    if unsafe := sorted(str(file.relative_to(export)) for file in export.rglob("*") if file.suffix in PICKLES):
        raise ValueError(f"{export} holds {', '.join(unsafe)}; hubs are given safetensors alone")
    run = run_of(export)
    evaluation = read_evaluation(run)
    student = evaluation and own_point(evaluation, export, run, origin)
    with whole_folder(folder) as aside:
        shutil.copytree(export, aside, dirs_exist_ok=True)
        write_json(aside / EXPORT_REPORT, public_report(load_json(export / EXPORT_REPORT), repo))
        for file in aside.rglob("*config.json"):  # diffusers notes where a network was loaded from
            write_json(file, {key: value for key, value in load_json(file).items() if key != "_name_or_path"})
        prompts: Sequence[str] = ()
        if evaluation and student:
            prompts = write_samples(aside / SAMPLES, run, [teacher_of(evaluation), student], evaluation.shown)
        write_text(aside / CARD, card(export, run, repo, licence, evaluation, student, prompts))


def public_report(report: dict[str, Any], repo: str) -> dict[str, Any]:
    """export_report.json without the paths of the machine: of the teacher its name, and for the export `repo`."""
    teacher = report["origin"]["teacher"]
    name = teacher if HUB_ID.fullmatch(teacher) and not Path(teacher).exists() else Path(teacher).stem
    load = LOADED_FROM.sub(f'from_pretrained("{repo}"', report["load"])
    return {**report, "load": load, "origin": {**report["origin"], "teacher": name}}


def run_of(export: Path) -> Path:
    """The run that an export lies in."""
    for folder in export.resolve().parents:
        if (folder / "config.yaml").is_file():
            return folder
    raise ValueError(f"{export} lies in no run: name an export where it was made, as runs/prune_unet/export")


def own_point(evaluation: Evaluation, export: Path, run: Path, origin: Origin) -> Point | None:
    """What the run measured of this export at its own steps; None where it measured nothing of it."""
    stage = export.resolve().parent
    name = evaluation.points[-1].model if stage == run else stage.name
    own = [point for point in evaluation.points if point.model == name]
    return next((point for point in own if point.steps == origin.steps), own[-1] if own else None)


def teacher_of(evaluation: Evaluation) -> Point:
    return next(point for point in evaluation.points if evaluation.is_reference(point))


# ---- the card ----


def card(
    export: Path, run: Path, repo: str, licence: str | None, evaluation: Evaluation | None, student: Point | None,
    prompts: Sequence[str],
) -> str:  # fmt: skip
    """The export's own card under the name `repo`, with what its run says."""
    own, config = ModelCard.load(export / CARD), OmegaConf.load(run / "config.yaml")
    licence = licence or teachers_licence(config)
    data: dict[str, Any] = {**own.data.to_dict(), "license": licence, "model_name": repo.rpartition("/")[2]}
    sections = []
    if evaluation and student:
        data["eval_results"] = results(evaluation, student, data["pipeline_tag"])
        sections.append(f"## Scores\n\n{scores(evaluation, student, run)}")
    if prompts:
        words = "; ".join(prompts)
        sections.append(f"## Samples\n\n![The teacher above and this model below, for: {words}]({SAMPLES})\n\n"
                        f"The teacher above, this model below, from the same noise: {words}.")  # fmt: skip
    sections += [f"## Training\n\n{training(config, evaluation)}", f"## Licence\n\n{licence_line(licence)}"]
    text = own.text.replace(PLACE, repo).strip()
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n{text}\n\n" + "\n\n".join(sections) + "\n"


def teachers_licence(config: Any) -> str | None:
    """What the card of a teacher in a local folder says."""
    file = Path(str(OmegaConf.select(config, "model.name_or_path"))) / CARD
    return ModelCard.load(file).data.to_dict().get("license") if file.is_file() else None


def licence_line(licence: str | None) -> str:
    named = f"{licence}, as its author states." if licence else "None is stated."
    return f"{named} A student is made of its teacher's weights, whose licence holds for it, too."


def results(evaluation: Evaluation, student: Point, task: str) -> list[EvalResult]:
    if "clip" not in student.metrics:
        return []
    scorer = f"{evaluation.protocol.get('model')} {evaluation.protocol.get('pretrained') or ''}".strip()
    return [EvalResult(
        task_type=task, dataset_type="prompts", dataset_name=f"{evaluation.n} prompts, {evaluation.prompts}",
        metric_type="clip_score", metric_name=f"CLIP score by {scorer}", metric_value=round(student.clip["mean"], 2),
    )]  # fmt: skip


def scores(evaluation: Evaluation, student: Point, run: Path) -> str:
    """The teacher at its steps and at the student's, and the student, with the protocol below."""
    reference = teacher_of(evaluation)
    same = evaluation.find(reference.model, student.steps, reference.guidance)
    points = [*dict.fromkeys(point.key for point in (reference, same, student) if point)]
    rows = [point for point in evaluation.points if point.key in points]
    names = {reference.model: "teacher", student.model: "this model"}
    columns = {
        "model": lambda point: names[point.model],
        "sampling steps": lambda point: str(point.steps),
        "evaluations": lambda point: str(point.facts.get("evaluations", "–")),
    }
    if evaluation.has_prompts:
        columns |= {
            "CLIP score ± standard error": lambda point: score(point.clip),
            "minus the teacher's, paired [95 %]": lambda point: difference(point.clip.get("versus_reference")),
        }
    columns |= spread_columns(rows)
    if ms := denoiser_ms(run):
        columns["denoiser, ms a row"] = lambda point: f"{ms[point.model]:.1f}" if point.model in ms else "–"
    where, seed = evaluation.environment, evaluation.protocol.get("seed")
    commit = f", slimstep {where['commit']}" if where.get("commit") else ""
    prompts = f"{evaluation.n} prompts ({evaluation.prompts}), image seed {seed}"
    return f"{Table.of(columns, rows).markdown}\n{prompts}; {where['device']}, torch {where['torch']}{commit}."


def denoiser_ms(run: Path) -> Mapping[str, float]:
    """{model: milliseconds of one row}, as a distillation has measured them."""
    file = run / "unet_ms.json"
    return load_json(file)["ms"]["1"] if file.is_file() else {}


def training(config: Any, evaluation: Evaluation | None) -> str:
    """What it was trained with, without the paths of the machine."""
    objective, train = OmegaConf.to_container(config.objective), config.train
    kind, pairs = objective.pop("_target_").rpartition(".")[2], OmegaConf.to_container(config.data.pairs)
    data = pairs.pop("_target_").rpartition(".")[2]
    lines = [
        f"- Job: `{str(config.job).rpartition('.')[2]}` of slimstep, seed {config.seed}",
        f"- Objective: {kind} ({words(objective)})",
        f"- {train.steps} steps of {train.batch_size * train.accumulation}, learning rate {train.learning_rate:g}, EMA "
        f"{train.ema_decay:g}",
        f"- Data: {data} ({words(pairs)})",
    ]
    if start := OmegaConf.select(config, "distillation.student"):
        lines.insert(1, f"- Starts from: `{'/'.join(Path(start).parts[-3:])}`")
    if evaluation and (seen := evaluation.seen):
        counted = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in seen.items())
        lines.append(f"- Of the {evaluation.n} prompts of the evaluation: {counted}")
    return "\n".join(lines)


def words(options: Mapping[str, Any]) -> str:
    """Options as words; of a path only its last part."""
    said = {key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
            for key, value in options.items() if value is not None}  # fmt: skip
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in said.items())


# ---- samples ----


def write_samples(file: Path, run: Path, points: Sequence[Point], shown: Sequence[str]) -> list[str]:
    """A row of pictures for each point; returns their prompts, none where a run kept no pictures."""
    folders = [run / f"images/{p.model}/steps-{p.steps}-guidance-{p.guidance}" for p in points]
    numbers = [n for n in range(len(shown)) if all((folder / f"{n:03d}.png").is_file() for folder in folders)][:SAMPLED]
    if not numbers:
        return []
    rows = [[Image.open(folder / f"{n:03d}.png").convert("RGB") for n in numbers] for folder in folders]
    width, height = rows[0][0].size
    size = len(numbers) * (width + MARGIN) - MARGIN, len(rows) * (height + MARGIN) - MARGIN
    grid = Image.new("RGB", size, "white")
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            grid.paste(picture.resize((width, height)), (c * (width + MARGIN), r * (height + MARGIN)))
    grid.save(file)
    return [shown[n] for n in numbers]
