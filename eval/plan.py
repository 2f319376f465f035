"""What a job would do: its stages, which are done, and what each asks for. Nothing is trained or written."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import DiffusionPipeline

from slimstep.engine.config import TrainConfig
from slimstep.engine.identity import SCORER_CHECK
from slimstep.engine.objective import Cost
from slimstep.engine.planning import Plan, duration
from slimstep.engine.run import FINISHED, Run
from slimstep.eval.config import Config
from slimstep.eval.inputs import Teacher, has_weights
from slimstep.eval.memory_plan import drawing_lines, memory_lines
from slimstep.eval.pages.tables import markdown_table
from slimstep.eval.pages.text import count, size
from slimstep.eval.throughput import hours
from slimstep.models.cost import count_gflops
from slimstep.models.family import denoiser_of, with_variance
from slimstep.models.pipeline import networks

TEACHER_ONCE = Cost(rows=1)
CHECKPOINT_COPIES, BYTES = 4, 4  # a checkpoint holds weights, two moments of AdamW and the EMA


@dataclass(frozen=True)
class Stage:
    """An artifact of a job and what making it costs.

    `forwards` counts denoiser rows without gradients, a guided image step being two, `trained` those with a backward;
    `decoded` images of a decoder that learns.
    """

    artifact: str
    work: str
    forwards: int = 0
    disk_bytes: int = 0
    trained: int = 0
    decoded: int = 0


def training(
    stage: str,
    config: TrainConfig,
    teacher: Teacher,
    work: str = "",
    cost: Cost = TEACHER_ONCE,
) -> Stage:
    """A stage of the loop, whose objective has this cost; no student is larger than the teacher."""
    samples = config.steps * config.batch_size * config.accumulation * teacher.run.accelerator.num_processes
    size = BYTES * teacher.unet.num_parameters()
    checkpoints = min(config.keep_checkpoints, (config.steps - 1) // config.checkpoint_every)
    kept = CHECKPOINT_COPIES * (size + BYTES * cost.beside) * checkpoints
    summary = ", ".join(filter(None, [f"{config.steps} steps, {samples} samples", work]))
    # A predicted variance is the teacher's wherever the student is trained (eval/variance.py).
    of_variance = cost.trained_rows if with_variance(denoiser_of(teacher.unet)) else 0
    rows, trained = round(samples * (cost.rows + of_variance)), round(samples * cost.trained_rows)
    return Stage(f"{stage}/weights.safetensors", summary, rows, size + kept, trained=trained)


def export(artifact: str, teacher: Teacher) -> Stage:
    """A diffusers folder: the denoiser, and what it is exported with."""
    parts = sum(p.numel() for network in networks(teacher.pipeline) for p in network.parameters())
    return Stage(artifact, "", 0, BYTES * parts)


def scorer_stage(run: Run) -> list[Stage]:
    """The check of the scorer, which costs seconds; a finished run is not checked again."""
    work = "up to 256 of the data's images, with their own captions and with shuffled ones"
    return [] if run.made(FINISHED) else [Stage(SCORER_CHECK, work)]


def image_count(config: Config) -> int:
    """Images of an evaluated point: one of every prompt, and for diversity more of the first."""
    evaluation = config.evaluation
    return config.eval.prompts + evaluation.diversity_prompts * (evaluation.diversity_seeds - 1)


def image_rows(steps: int, guidance_scale: float) -> int:
    """Denoiser rows of one image."""
    return steps * (2 if guidance_scale > 1 else 1)


def planned(teacher: Teacher, stages: Sequence[Stage], trainings: Sequence[TrainConfig], beside: int = 0) -> Plan:
    """The stages as a table, then the teacher and the estimates. `beside`: weights trained beside the student."""
    time, hours = time_line(teacher, stages, trainings)
    table = stages_table(teacher.run, stages)
    return Plan("\n".join([table, *estimates(teacher, stages, trainings, time, beside)]), hours)


def stages_table(run: Run, stages: Sequence[Stage]) -> str:
    rows = [
        [s.artifact, state(run, s), s.work, rows_of(s.forwards), rows_of(s.trained), size(s.disk_bytes)] for s in stages
    ]
    return markdown_table(["artifact", "state", "work", "denoiser forwards", "with backward", "disk"], rows)


def rows_of(number: int) -> str:
    return f"{number:,}" if number else "–"


def state(run: Run, stage: Stage) -> str:
    return "done" if (run.path / stage.artifact).exists() else "to do"


def estimates(
    teacher: Teacher, stages: Sequence[Stage], trainings: Sequence[TrainConfig], time: str, beside: int
) -> list[str]:
    """The run's place, its denoiser, and what is left to do in time, memory and disk."""
    unet = teacher.unet
    lines = [
        f"run        {teacher.run.path}",
        f"teacher    {count(unet.num_parameters())} parameters, {len(unet.kept_blocks)} blocks, "
        f"{count_gflops(unet, tokens=teacher.text_length):.2f} GFLOPs a forward",
        time,
    ]
    if trainings:
        lines += memory_lines(teacher, list(trainings), beside)
    if isinstance(teacher.pipeline, DiffusionPipeline):
        lines += drawing_lines(teacher.pipeline)
    lines.append(f"disk       at most {size(sum(stage.disk_bytes for stage in stages))}, the cache not counted")
    return lines


def time_line(teacher: Teacher, stages: Sequence[Stage], trainings: Sequence[TrainConfig]) -> tuple[str, float]:
    """What is left to do in rows and hours in words, and the hours."""
    left = [stage for stage in stages if state(teacher.run, stage) == "to do"]
    rows = {
        "forward": sum(s.forwards for s in left if s.trained),  # of a teacher, in the precision that is trained in
        "sampling": sum(s.forwards for s in left if not s.trained),
        "training": sum(s.trained for s in left),
        "decoding": sum(s.decoded for s in left),
    }
    if not any(rows.values()):
        return "to do      nothing that takes long", 0.0
    configured = teacher.config.rates
    unknown = [kind for kind, number in rows.items() if number and not configured[kind]]
    if unknown and not has_weights(teacher.pipeline):
        work = ", ".join(f"{number:,} rows of {kind}" for kind, number in rows.items() if number)
        how = " ".join(f"rates.{kind}=…" for kind in unknown)
        return f"to do      {work}; how long they take is measured where the weights are, or is said by {how}", 0.0
    largest = max(trainings, key=lambda config: config.batch_size, default=teacher.config.train)
    time, rates = hours(teacher, rows, largest)
    work = ", ".join(f"{rows[kind]:,} rows of {kind} at {rate:.3g}/s" for kind, rate in rates.items())
    count = teacher.run.accelerator.num_processes
    return f"to do      about {duration(time)} on {count} process(es): {work} each", time
