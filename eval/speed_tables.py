"""What is timed: the benchmark's combinations, the ladder of optimisations, the table of pipelines."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from functools import cache
from itertools import product
from typing import Any

from omegaconf import OmegaConf

from slimstep.eval.benchmarking import SETUP_FIELDS, SpeedBench, file_name
from slimstep.eval.timing.setups import CannotRunError, Setup
from slimstep.eval.timing.speed import Subject, Variant
from slimstep.eval.timing.tasks import TASKS, task_pipeline

Rows = list[dict[str, Any]]
ROW_KEYS = {"name", *(field.name for field in fields(Variant)), *SETUP_FIELDS} - {"setup"}


def benchmark_rows(bench: SpeedBench) -> Rows:
    """Every model in every setup at every batch.

    Each is timed beside the same model in the base setup, and beside the first model in it, at all of its steps.
    """
    rows = []
    for batch, (name, where) in product(bench.config.benchmark.batches, bench.models.items()):
        first = cache(lambda batch=batch: first_model(bench, batch))
        for steps in bench.steps_of(name):
            variant, place = Variant(where, steps, bench.base), f"{name}/steps-{steps}/batch-{batch}"
            base = cache(lambda variant=variant, batch=batch: bench.subject(variant, batch))
            plain = replace(variant, setup=Setup())
            reference = cache(lambda plain=plain, at=f"{name}-steps-{steps}": bench.reference_images(at, plain))
            made = []
            for setup in bench.setups:
                this = replace(variant, setup=setup)

                def make(this=this, batch=batch, base=base, reference=reference, first=first):
                    others = {} if this.model == bench.models[bench.reference] else first()
                    return bench.measured(bench.subject(this, batch), {"base": base(), **others}, reference())

                told = {"model": name, "steps": steps, "batch": batch, "setup": asdict(setup), "name": str(setup)}
                made.append(bench.row(f"{place}/{setup.key}", told, make))
            base.cache_clear()  # compiling in other processes wants the device's memory
            first.cache_clear()
            for row, setup in zip(made, bench.setups, strict=True):
                if bench.config.benchmark.first_image and setup.compile != "eager" and not row["cannot"]:
                    this = replace(variant, setup=setup)
                    row["first_image"] = bench.first_image(this, batch, f"{place}/{setup.key}")
            rows += made
    return rows


def first_model(bench: SpeedBench, batch: int) -> dict[str, Subject]:
    """{"teacher, 32 steps": …}: the first model in the base setup, one pipeline at all of its numbers of steps."""
    most, *fewer = bench.steps_of(bench.reference)
    subject = bench.subject(Variant(bench.models[bench.reference], most, bench.base), batch)
    subjects = {most: subject, **{steps: subject.at(steps) for steps in fewer}}
    return {f"{bench.reference}, {steps} steps": made for steps, made in subjects.items()}


def ladder_rows(bench: SpeedBench) -> Rows:
    """Optimisations one upon the other. A row that cannot run here, or is shown to be slower, is not built upon.

    The first row is timed beside a second pipeline of its own kind: what ratios are worth.
    """
    if len(bench.config.benchmark.batches) > 1:
        raise ValueError(f"benchmark.batches={list(bench.config.benchmark.batches)}: a ladder has one batch size")
    (teacher, *_), (batch,) = bench.models.values(), bench.config.benchmark.batches
    state = Variant(teacher, bench.steps_of(bench.reference)[0])
    made: dict[Variant, Subject] = {}

    def subject(variant: Variant) -> Subject:
        if variant not in made:
            made[variant] = bench.subject(variant, batch)
        return made[variant]

    rows: Rows = []
    first = before = None
    for number, changes in enumerate(read_ladder(bench)):
        name = changes.pop("name")

        def make(changes=changes, state=state, first=first, before=before):
            variant = changed(state, changes, bench.models)
            if first is None:
                others = {"itself": subject(variant)}
            else:
                others = {"first": subject(first), "before": subject(before)}
            this = bench.subject(variant, batch)
            row = bench.measured(this, others, bench.reference_images("first", first or variant))
            made[variant] = this
            kept = first is None or row["speedup"]["before"]["high"] >= 1
            return {**row, "variant": asdict(variant), "kept": kept}

        told = {"name": name, "batch": batch, "changes": changes, "kept": False}
        row = bench.row(f"{number:02d}-{file_name(name)}", told, make)
        rows.append(row)
        if row["kept"]:
            state = before = changed(state, changes, bench.models)
            first = first or state
        for variant in set(made) - {first, before}:
            del made[variant]
    return rows


def read_ladder(bench: SpeedBench) -> list[dict[str, Any]]:
    """benchmark.rows. ValueError for a row without a name, or with keys that are none."""
    rows = [OmegaConf.to_container(row) if OmegaConf.is_config(row) else row for row in bench.config.benchmark.rows]
    if not rows:
        raise ValueError("benchmark.rows=[] is a ladder without rows")
    for row in rows:
        if not isinstance(row, Mapping) or "name" not in row:
            raise ValueError(f"benchmark.rows: {row} must be a table with a name and what changes")
        if unknown := set(row) - ROW_KEYS:
            raise ValueError(f"benchmark.rows: {row['name']!r} has {sorted(unknown)}; a row takes {sorted(ROW_KEYS)}")
    return [dict(row) for row in rows]


def changed(state: Variant, changes: Mapping[str, Any], models: Mapping[str, str]) -> Variant:
    """The variant with a row's changes; models go by their name. CannotRunError where that names none."""
    setup = replace(state.setup, **{key: value for key, value in changes.items() if key in SETUP_FIELDS})
    others = {key: value for key, value in changes.items() if key not in SETUP_FIELDS}
    for key in ("model", "unet", "vae"):
        if (name := others.get(key)) is not None:
            if name not in models:
                raise CannotRunError(f"models names no {name!r}: models={{…, {name}: FOLDER}}")
            others[key] = models[name]
    return replace(state, setup=setup, **others)


def pipelines_rows(bench: SpeedBench) -> Rows:
    """Every model in every task at every batch, in every mode of compilation beside eager."""
    config, rows = bench.config.benchmark, []
    if unknown := set(config.tasks) - set(TASKS):
        raise ValueError(f"benchmark.tasks={sorted(unknown)} are unknown; choose from {TASKS}")
    for task, (name, where), batch in product(config.tasks, bench.models.items(), config.batches):
        variant = Variant(where, bench.steps_of(name)[0], bench.base)

        def subject(variant: Variant, task=task, batch=batch) -> Subject:
            pipeline, given = task_pipeline(bench.given.load(variant.model), task, batch)
            return bench.subject(variant, batch, pipeline, **given)

        eager = cache(lambda subject=subject, variant=variant: subject(variant))
        for mode in dict.fromkeys(("eager", *config.compile)):
            this = replace(variant, setup=replace(variant.setup, compile=mode))
            make = timing(bench, subject, this, eager if mode != "eager" else None)
            told = {"task": task, "model": name, "batch": batch, "mode": mode}
            rows.append(bench.row(f"{task}/{name}/batch-{batch}/{mode}", told, make))
    return rows


def timing(
    bench: SpeedBench, subject: Callable[[Variant], Subject], variant: Variant, eager: Callable[[], Subject] | None
) -> Callable[[], dict[str, Any]]:
    """Makes a row of the pipelines table; `its` counts denoising steps as the published tables do."""

    def make() -> dict[str, Any]:
        row = bench.measured(subject(variant), {"eager": eager()} if eager else {})
        return {**row, "its": 1e3 * row["unet_calls"] / row["ms"]["median"]}

    return make


TABLES = {"benchmark": benchmark_rows, "ladder": ladder_rows, "pipelines": pipelines_rows}
