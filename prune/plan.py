"""What the pruning job would do: its stages, which are done, and what each asks for. Nothing is trained or written."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.config import TrainConfig
from eval.report import count, markdown_table
from models.cost import count_activation_bytes, count_gflops
from prune.bench import PruneBench

# Weights, gradient, two moments of AdamW and the EMA; a checkpoint holds all but the gradient.
TRAINED_COPIES, CHECKPOINT_COPIES, BYTES = 5, 4, 4


@dataclass(frozen=True)
class Stage:
    """A product of the job and what making it costs; `forwards` counts UNet rows, a guided image step being two."""

    product: str
    work: str
    forwards: int
    disk_bytes: int


def stages(bench: PruneBench) -> Iterator[Stage]:
    """All stages in the order in which they run. A student is never larger than the teacher here: upper bounds."""
    config, unet = bench.config, bench.teacher
    size, sites = BYTES * unet.num_parameters(), len(unet.kept_sites)
    judged = sampling_rows(config.eval) * config.eval.prompts
    yield Stage("judged/teacher.json", images(config.eval), judged, 0)
    for r in range(config.search.rounds):
        stage = f"round-{r:02d}"
        yield training(stage, config.train, bench, size)
        yield Stage(f"{stage}/latency.json", config.latency.table or f"{sites} blocks", 0, 0)
        if bench.search.needs_scores:
            drawn = (1 + sites) * config.scoring.prompts
            yield Stage(
                f"{stage}/scores.json", f"{drawn} images ({sites} removals)", drawn * sampling_rows(config.scoring), 0
            )
        yield Stage(f"{stage}/decision.json", "", 0, 0)
        yield Stage(f"judged/{stage}.json", images(config.eval), judged, 0)
    yield training("recovery", config.recovery.train, bench, size)
    yield Stage("judged/student.json", images(config.eval), judged, 0)
    yield Stage("export", "", 0, size)
    yield Stage("report.html", "", 0, 0)


def training(stage: str, config: TrainConfig, bench: PruneBench, size: int) -> Stage:
    samples = config.steps * config.batch_size * config.accumulation * bench.run.accelerator.num_processes
    kept = CHECKPOINT_COPIES * size * min(config.keep_checkpoints, (config.steps - 1) // config.checkpoint_every)
    return Stage(f"{stage}/weights.safetensors", f"{config.steps} steps, {samples} samples", samples, size + kept)


def sampling_rows(config) -> int:
    """UNet rows of one image."""
    return config.steps * (2 if config.guidance_scale > 1 else 1)


def images(config) -> str:
    return f"{config.prompts} images of {config.steps} steps"


def print_plan(bench: PruneBench) -> int:
    """The stages as a table, then the teacher and the estimates; returns exit code 0."""
    teacher, todo, rows = bench.teacher, 0, []
    for stage in stages(bench):
        done = bench.run.made(stage.product)
        todo += 0 if done else stage.forwards
        state = "done" if done else "to do"
        rows.append([stage.product, state, stage.work, f"{stage.forwards:,}", size(stage.disk_bytes)])
    if not bench.run.accelerator.is_main_process:
        return 0
    trained = TRAINED_COPIES * BYTES * teacher.num_parameters()
    print(markdown_table(["product", "state", "work", "UNet forwards", "disk"], rows))
    print(f"run        {bench.run.path}")
    print(f"teacher    {count(teacher.num_parameters())} parameters, {len(teacher.kept_sites)} blocks, "
          f"{count_gflops(teacher, tokens=bench.text_length):.2f} GFLOPs a forward")  # fmt: skip
    print(f"to do      {todo:,} UNet forwards (rows; a training sample also runs backward and its teacher)")
    batch = max(bench.config.train.batch_size, bench.config.recovery.train.batch_size)
    activations = count_activation_bytes(teacher, batch, bench.text_length)
    print(f"memory     {size(trained)} for the trained UNet, {size(trained // TRAINED_COPIES)} for the teacher, about "
          f"{size(activations)} of activations for batch {batch}, in float32, on every process")  # fmt: skip
    print(f"disk       at most {size(sum(stage.disk_bytes for stage in stages(bench)))}, the cache not counted")
    return 0


def size(count_bytes: int) -> str:
    """Bytes in the unit people read: 3.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count_bytes < 1000:
            return f"{count_bytes:.3g} {unit}" if count_bytes else "–"
        count_bytes /= 1000
    return f"{count_bytes:.3g} TB"
