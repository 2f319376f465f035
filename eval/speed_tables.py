"""What is timed: the benchmark's combinations, the cumulative benchmark of optimisations, the table of pipelines."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from functools import cache, partial
from itertools import product
from typing import Any

from omegaconf import OmegaConf

from slimstep.eval.benchmarking import CONFIG_FIELDS, Benchmark, file_name
from slimstep.eval.timing.inference import CannotRunError, InferenceConfig
from slimstep.eval.timing.speed import BenchmarkCase, TimedPipeline
from slimstep.eval.timing.tasks import TASKS, task_pipeline

Rows = list[dict[str, Any]]
ROW_KEYS = {"name", *(field.name for field in fields(BenchmarkCase)), *CONFIG_FIELDS} - {"inference"}


def benchmark_rows(benchmark: Benchmark) -> Rows:
    """Every model in every inference config at every batch.

    Each is timed beside the same model in the base config, and beside the first model in it, at all of its steps.
    """
    rows: Rows = []
    for batch, name in product(benchmark.config.benchmark.batches, benchmark.models.paths):
        first = cache(partial(first_model, benchmark, batch))
        for steps in benchmark.models.steps(name):
            rows += config_rows(benchmark, name, steps, batch, first)
    return rows


def config_rows(
    benchmark: Benchmark, name: str, steps: int, batch: int, first: Callable[[], dict[str, TimedPipeline]]
) -> Rows:
    """A model at its steps in every inference config; compiling is measured last, by processes of their own."""
    case = BenchmarkCase(benchmark.models.paths[name], steps, benchmark.base)
    cases = [replace(case, inference=inference) for inference in benchmark.inference_configs]
    base = cache(lambda: benchmark.timed_pipeline(case, batch))
    reference = cache(
        lambda: benchmark.reference_images(f"{name}-steps-{steps}", replace(case, inference=InferenceConfig()))
    )

    def make(this: BenchmarkCase) -> dict[str, Any]:
        others = {} if this.model == next(iter(benchmark.models.paths.values())) else first()
        return benchmark.measured(benchmark.timed_pipeline(this, batch), {"base": base(), **others}, reference())

    def place(this: BenchmarkCase) -> str:
        return f"{name}/steps-{steps}/batch-{batch}/{this.inference.key}"

    rows = []
    for this in cases:
        label = {"model": name, "steps": steps, "batch": batch, "setup": asdict(this.inference),
                 "name": str(this.inference)}  # fmt: skip
        rows.append(benchmark.row(place(this), label, partial(make, this)))
    base.cache_clear()  # compiling in other processes wants the device's memory
    first.cache_clear()
    for row, this in zip(rows, cases, strict=True):
        if benchmark.config.benchmark.cold_start and this.inference.compile != "eager" and not row["cannot"]:
            row["cold_start"] = benchmark.cold_start(this, batch, place(this))
    return rows


def first_model(benchmark: Benchmark, batch: int) -> dict[str, TimedPipeline]:
    """{"teacher, 32 steps": …}: the first model in the base config, one pipeline at all of its numbers of steps."""
    name, most = benchmark.models.reference
    timed = benchmark.timed_pipeline(BenchmarkCase(benchmark.models.paths[name], most, benchmark.base), batch)
    fewer = benchmark.models.steps(name)[1:]
    return {f"{name}, {most} steps": timed, **{f"{name}, {steps} steps": timed.at(steps) for steps in fewer}}


def cumulative_rows(benchmark: Benchmark) -> Rows:
    """Optimisations one upon the other. A row that cannot run here, or is shown to be slower, is not built upon.

    The first row is timed beside a second pipeline of its own kind: what ratios are worth.
    """
    if len(benchmark.config.benchmark.batches) > 1:
        raise ValueError(f"benchmark.batches={list(benchmark.config.benchmark.batches)}: give one batch size")
    (teacher, *_), (batch,) = benchmark.models.paths.values(), benchmark.config.benchmark.batches
    state = BenchmarkCase(teacher, benchmark.models.reference[1])
    made: dict[BenchmarkCase, TimedPipeline] = {}

    def timed(case: BenchmarkCase) -> TimedPipeline:
        if case not in made:
            made[case] = benchmark.timed_pipeline(case, batch)
        return made[case]

    rows: Rows = []
    first = before = None
    for number, changes in enumerate(read_cumulative(benchmark)):
        name = changes.pop("name")

        def make(changes=changes, state=state, first=first, before=before):
            case = changed(state, changes, benchmark.models.paths)
            others = {"first": timed(first), "before": timed(before)} if first else {"itself": timed(case)}
            this = benchmark.timed_pipeline(case, batch)
            row = benchmark.measured(this, others, benchmark.reference_images("first", first or case))
            made[case] = this
            kept = first is None or row["speedup"]["before"]["high"] >= 1
            return {**row, "case": asdict(case), "kept": kept}

        label = {"name": name, "batch": batch, "changes": changes, "kept": False}
        row = benchmark.row(f"{number:02d}-{file_name(name)}", label, make)
        rows.append(row)
        if row["kept"]:
            state = before = changed(state, changes, benchmark.models.paths)
            first = first or state
        for case in set(made) - {first, before}:
            del made[case]
    return rows


def read_cumulative(benchmark: Benchmark) -> list[dict[str, Any]]:
    """benchmark.rows. ValueError for a row without a name, or with keys that are none."""
    rows = [OmegaConf.to_container(row) if OmegaConf.is_config(row) else row for row in benchmark.config.benchmark.rows]
    if not rows:
        raise ValueError("benchmark.rows=[] leaves the cumulative benchmark without rows")
    for row in rows:
        if not isinstance(row, Mapping) or "name" not in row:
            raise ValueError(f"benchmark.rows: {row} must be a table with a name and what changes")
        if unknown := set(row) - ROW_KEYS:
            raise ValueError(f"benchmark.rows: {row['name']!r} has {sorted(unknown)}; a row takes {sorted(ROW_KEYS)}")
    return [dict(row) for row in rows]


def changed(state: BenchmarkCase, changes: Mapping[str, Any], models: Mapping[str, str]) -> BenchmarkCase:
    """The benchmark case with a row's changes; models go by their name. CannotRunError where that names none."""
    inference = replace(state.inference, **{key: value for key, value in changes.items() if key in CONFIG_FIELDS})
    others = {key: value for key, value in changes.items() if key not in CONFIG_FIELDS}
    for key in ("model", "unet", "vae"):
        if (name := others.get(key)) is not None:
            if name not in models:
                raise CannotRunError(f"models names no {name!r}: models={{…, {name}: FOLDER}}")
            others[key] = models[name]
    return replace(state, inference=inference, **others)


def pipelines_rows(benchmark: Benchmark) -> Rows:
    """Every model in every task at every batch, in every mode of compilation beside eager."""
    config, rows = benchmark.config.benchmark, []
    if unknown := set(config.tasks) - set(TASKS):
        raise ValueError(f"benchmark.tasks={sorted(unknown)} are unknown; choose from {TASKS}")
    for task, (name, where), batch in product(config.tasks, benchmark.models.paths.items(), config.batches):
        case = BenchmarkCase(where, benchmark.models.steps(name)[0], benchmark.base)

        def timed(case: BenchmarkCase, task=task, batch=batch) -> TimedPipeline:
            pipeline, kwargs = task_pipeline(benchmark.models.load(case.model), task, batch)
            return benchmark.timed_pipeline(case, batch, pipeline, **kwargs)

        eager = cache(lambda timed=timed, case=case: timed(case))
        for mode in dict.fromkeys(("eager", *config.compile)):
            this = replace(case, inference=replace(case.inference, compile=mode))

            def make(this=this, timed=timed, beside={"eager": eager} if mode != "eager" else {}):
                row = benchmark.measured(timed(this), {name: other() for name, other in beside.items()})
                return {**row, "its": 1e3 * row["unet_calls"] / row["ms"]["median"]}  # as the published tables do

            label = {"task": task, "model": name, "batch": batch, "mode": mode}
            rows.append(benchmark.row(f"{task}/{name}/batch-{batch}/{mode}", label, make))
    return rows


TABLES = {"benchmark": benchmark_rows, "cumulative": cumulative_rows, "pipelines": pipelines_rows}
