"""The stages of the pruning job and of a latency table, with what each costs."""

from collections.abc import Iterator

from slimstep.eval.plan import Stage, export, image_rows, training
from slimstep.prune.bench import PruneBench


def pruning_stages(bench: PruneBench) -> Iterator[Stage]:
    """All stages in the order in which they run; upper bounds, for a student is never larger than the teacher."""
    config, blocks = bench.config, len(bench.teacher.kept_blocks)
    yield judgement("teacher", bench)
    for r in range(config.search.rounds):
        stage = f"round-{r:02d}"
        yield training(stage, config.train, bench, taught=int(config.objective.get("teacher_weight", 0) > 0))
        yield Stage(f"{stage}/latency.json", config.latency.table or f"{blocks} blocks")
        if bench.search.needs_scores:
            drawn, scoring = (1 + blocks) * config.scoring.prompts, config.scoring
            rows = drawn * image_rows(scoring.steps, scoring.guidance_scale)
            yield Stage(f"{stage}/scores.json", f"{drawn} images ({blocks} removals)", rows)
        yield Stage(f"{stage}/decision.json", "")
        yield judgement(stage, bench)
    yield export("evolved", bench)
    yield training("recovery", config.recovery.train, bench)
    yield judgement("student", bench)
    yield export("export", bench)
    yield Stage("report.html", "")


def judgement(name: str, bench: PruneBench) -> Stage:
    config = bench.config.eval
    rows = config.prompts * image_rows(config.steps, config.guidance_scale)
    return Stage(f"judged/{name}.json", f"{config.prompts} images of {config.steps} steps", rows)


def latency_stage(bench: PruneBench) -> Stage:
    """At most: a GPU or compile=true times every block by a pair of UNets, a CPU all blocks at once."""
    config, blocks = bench.latency, len(bench.unet.kept_blocks)
    pairs = blocks + config.additive_samples
    work = f"{blocks} blocks, {config.additive_samples} random removals, batch {config.batch}"
    return Stage("latency.json", work, 2 * pairs * (config.warmup + config.iterations) * config.batch)
