"""Students as diffusers folders, with what is said of them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from slimstep.engine.loop import LOW_RANK
from slimstep.engine.run import FINISHED, Run
from slimstep.eval.inputs import Teacher
from slimstep.eval.record import Point, Values
from slimstep.models.card import Origin, origin_of, write_card
from slimstep.models.first_frames import begins_with_frame, call_options
from slimstep.models.networks import part_of, sequence_length, trained_steps_of
from slimstep.models.pipeline import export_pipeline

log = logging.getLogger("slimstep")


def export(
    student: DiffusionPipeline,
    name: str,
    teacher: Teacher,
    steps: int | None = None,
    guidance_scale: float | None = None,
) -> None:
    """The folder `name` of the run: the student as it was evaluated, but for its own `steps` and guidance."""
    sampling = teacher.config.eval
    scale = sampling.guidance_scale if guidance_scale is None else guidance_scale
    length, trained = sequence_length(student), trained_steps_of(student) and (steps or trained_steps_of(student))
    video = call_options(student) if begins_with_frame(student) else None
    origin = Origin(str(teacher.config.model.name_or_path), steps or sampling.steps, scale, length, trained, video)

    def write(folder: Path) -> None:
        log.info(f"exported: {export_pipeline(student, folder, origin=origin).load}")

    teacher.run.sealed_folder(name, write)


def export_low_rank(student: DiffusionPipeline, stage: str, run: Run) -> None:
    """STAGE/lora: what makes the teacher's own pipeline the student: the update that was trained, as a LoRA, and the
    scheduler."""

    def write(folder: Path) -> None:
        layers = load_file(run.path / stage / LOW_RANK)
        student.save_lora_weights(folder, **{f"{part_of(student)}_lora_layers": layers})
        student.scheduler.save_pretrained(folder / "scheduler")
        log.info(f"the student as a LoRA of its teacher: {folder}")

    run.sealed_folder(f"{stage}/lora", write)


def write_results(run: Run, name: str, results: Sequence[str]) -> None:
    """A line for every result in the model card of the export `name`; once the report is there it stays."""
    folder = run.path / name
    if run.accelerator.is_main_process and origin_of(folder) and not (run.path / FINISHED).exists():
        write_card(folder, results)


def result_line(point: Point) -> str:
    """A student's CLIP score, or, of an unconditional model, how far its images are from the teacher's and from real
    ones."""
    if "clip" in point.metrics:
        return "; ".join([clip_line(point.clip), *ratio_lines(point)])
    error, distance = point.metrics["image_error"], point.metrics["fd"]
    near = f"squared error to the teacher's images {error['mean']:.3g} ± {error['se']:.1g} % of the range"
    return f"{near}; Fréchet distance to {distance['n_real']} real images {distance['fd']:.3g} ({distance['features']})"


def ratio_lines(point: Point) -> Iterator[str]:
    """Of metrics whose ratio to the teacher's is known, as motion, that ratio."""
    for name, own in point.metrics.items():
        if own and (over := own.get("ratio_to_reference")):
            yield f"{name} {over['ratio']:.2f} [{over['low']:.2f}, {over['high']:.2f}] times the teacher's"


def clip_line(clip: Mapping[str, Values]) -> str:
    """A score with its standard error, and the difference to the teacher's with its interval."""
    against = clip["versus_reference"]
    paired = f"{against['mean']:+.2f} [{against['low']:+.2f}, {against['high']:+.2f}]"
    score = f"CLIP score {clip['mean']:.2f} ± {clip['se']:.2f}"
    return f"{score}; minus the teacher's, paired over {against['n']} prompts: {paired}"
