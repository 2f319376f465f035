"""What is timed: the benchmark's combinations, the cumulative benchmark of optimisations, the table of pipelines."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from functools import cache
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
    rows = []
    for batch, (name, where) in product(benchmark.config.benchmark.batches, benchmark.models.items()):
        first = cache(lambda batch=batch: first_model(benchmark, batch))
        for steps in benchmark.steps_of(name):
            case, place = BenchmarkCase(where, steps, benchmark.base), f"{name}/steps-{steps}/batch-{batch}"
            base = cache(lambda case=case, batch=batch: benchmark.timed_pipeline(case, batch))
            plain = replace(case, inference=InferenceConfig())
            reference = cache(lambda plain=plain, at=f"{name}-steps-{steps}": benchmark.reference_images(at, plain))
            made = []
            for inference in benchmark.inference_configs:
                this = replace(case, inference=inference)

                def make(this=this, batch=batch, base=base, reference=reference, first=first):
                    others = {} if this.model == benchmark.models[benchmark.reference] else first()
                    return benchmark.measured(
                        benchmark.timed_pipeline(this, batch), {"base": base(), **others}, reference()
                    )

                label = {
                    "model": name,
                    "steps": steps,
                    "batch": batch,
                    "setup": asdict(inference),
                    "name": str(inference),
                }
                made.append(benchmark.row(f"{place}/{inference.key}", label, make))
            base.cache_clear()  # compiling in other processes wants the device's memory
            first.cache_clear()
            for row, inference in zip(made, benchmark.inference_configs, strict=True):
                if benchmark.config.benchmark.cold_start and inference.compile != "eager" and not row["cannot"]:
                    this = replace(case, inference=inference)
                    row["cold_start"] = benchmark.cold_start(this, batch, f"{place}/{inference.key}")
            rows += made
    return rows


def first_model(benchmark: Benchmark, batch: int) -> dict[str, TimedPipeline]:
    """{"teacher, 32 steps": …}: the first model in the base config, one pipeline at all of its numbers of steps."""
    most, *fewer = benchmark.steps_of(benchmark.reference)
    timed = benchmark.timed_pipeline(BenchmarkCase(benchmark.models[benchmark.reference], most, benchmark.base), batch)
    timed_pipelines = {most: timed, **{steps: timed.at(steps) for steps in fewer}}
    return {f"{benchmark.reference}, {steps} steps": made for steps, made in timed_pipelines.items()}


def cumulative_rows(benchmark: Benchmark) -> Rows:
    """Optimisations one upon the other. A row that cannot run here, or is shown to be slower, is not built upon.

    The first row is timed beside a second pipeline of its own kind: what ratios are worth.
    """
    if len(benchmark.config.benchmark.batches) > 1:
        raise ValueError(f"benchmark.batches={list(benchmark.config.benchmark.batches)}: give one batch size")
    (teacher, *_), (batch,) = benchmark.models.values(), benchmark.config.benchmark.batches
    state = BenchmarkCase(teacher, benchmark.steps_of(benchmark.reference)[0])
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
            case = changed(state, changes, benchmark.models)
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
            state = before = changed(state, changes, benchmark.models)
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
    for task, (name, where), batch in product(config.tasks, benchmark.models.items(), config.batches):
        case = BenchmarkCase(where, benchmark.steps_of(name)[0], benchmark.base)

        def timed(case: BenchmarkCase, task=task, batch=batch) -> TimedPipeline:
            pipeline, kwargs = task_pipeline(benchmark.given.load(case.model), task, batch)
            return benchmark.timed_pipeline(case, batch, pipeline, **kwargs)

        eager = cache(lambda timed=timed, case=case: timed(case))
        for mode in dict.fromkeys(("eager", *config.compile)):
            this = replace(case, inference=replace(case.inference, compile=mode))
            make = timing(benchmark, timed, this, eager if mode != "eager" else None)
            label = {"task": task, "model": name, "batch": batch, "mode": mode}
            rows.append(benchmark.row(f"{task}/{name}/batch-{batch}/{mode}", label, make))
    return rows


def timing(
    benchmark: Benchmark,
    timed: Callable[[BenchmarkCase], TimedPipeline],
    case: BenchmarkCase,
    eager: Callable[[], TimedPipeline] | None,
) -> Callable[[], dict[str, Any]]:
    """Makes a row of the pipelines table; `its` counts denoising steps as the published tables do."""

    def make() -> dict[str, Any]:
        row = benchmark.measured(timed(case), {"eager": eager()} if eager else {})
        return {**row, "its": 1e3 * row["unet_calls"] / row["ms"]["median"]}

    return make


TABLES = {"benchmark": benchmark_rows, "cumulative": cumulative_rows, "pipelines": pipelines_rows}
