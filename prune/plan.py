"""The stages of the pruning job and of a latency table, with what each costs."""

from collections.abc import Iterator, Sequence
from typing import Any

from slimstep.engine.objective import Cost
from slimstep.eval.evaluator import place
from slimstep.eval.inputs import Teacher
from slimstep.eval.plan import Stage, export, image_count, image_rows, training
from slimstep.prune.changed import offered_narrower
from slimstep.prune.changes import Change, without_kept
from slimstep.prune.interactions import MOST_PAIRS
from slimstep.prune.local_recovery import recovery_cost, recovery_training
from slimstep.prune.search import measured_sets, needs_similarity

NAMES = {"remove": "removals", "narrow": "narrower parts", "quantize": "blocks in other dtypes", "merge": "merges"}


def pruning_stages(teacher: Teacher, search: Any) -> Iterator[Stage]:
    """All stages in the order in which they run; upper bounds, for a student is never larger than the teacher."""
    config, changes = teacher.config, changes_of(teacher)
    yield evaluation("teacher", teacher)
    for r in range(config.search.rounds):
        stage = f"round-{r:02d}"
        yield training(stage, config.train, teacher, cost=Cost(int(config.objective.get("teacher_weight", 0) > 0)))
        yield Stage(f"{stage}/latency.json", config.latency.table or timed(teacher))
        scoring = config.scoring
        rows = scoring.prompts * image_rows(scoring.steps, scoring.guidance_scale)
        if search.needs_scores:
            racing, screens = scoring.protocol == "racing", scoring.protocol != "snapfusion"
            drawn = (1 + len(changes)) * (min(scoring.race_prompts, scoring.prompts) if racing else scoring.prompts)
            limits = {"screened": "at most, behind a screen of all changes", "racing": "at most, by a race"}
            what = limits.get(scoring.protocol, counted(changes))
            evaluations = drawn * image_rows(scoring.steps, scoring.guidance_scale) + (drawn if screens else 0)
            yield Stage(f"{stage}/scores.json", f"{drawn} images ({what})", evaluations)
            if scoring.recovery_steps:
                yield locally_recovered(f"{stage}/scores.json", teacher, changes)
        if needs_similarity(search):
            yield Stage(f"{stage}/similarities.json", f"latents of {scoring.prompts} images", rows)
        if sets := config.search.interactions:
            pairs = f"{sets} random sets, and at most {MOST_PAIRS} pairs by images"
            per_set = rows if config.search.interactions_by == "images" else scoring.prompts
            base = 0 if config.search.interactions_by == "images" else rows + scoring.prompts
            yield Stage(f"{stage}/interactions.json", pairs, base + sets * per_set + (1 + 3 * MOST_PAIRS) * rows)
        finalists = measured_sets(search)
        drawn = f"at least {finalists} sets of changes by images" if finalists else ""
        yield Stage(f"{stage}/decision.json", drawn, (finalists + (finalists > 0)) * rows)
        yield evaluation(stage, teacher)
    yield export("evolved", teacher)
    yield training("recovery", config.recovery.train, teacher)
    yield evaluation("student", teacher)
    yield export("export", teacher)
    yield Stage("report.html", "")


def locally_recovered(artifact: str, teacher: Teacher, changes: Sequence[str]) -> Stage:
    """What local recovery adds to the scores: images of every change once more, and steps of its neighbours."""
    scoring = teacher.config.scoring
    evaluations = image_rows(scoring.steps, scoring.guidance_scale)
    cost = recovery_cost(changes, scoring.prompts, evaluations, recovery_training(scoring))["evaluations"]
    work = f"{scoring.recovery_steps} steps of local recovery, {len(changes) * scoring.prompts} images after it"
    return Stage(artifact, work, cost["without_gradient"], trained=cost["with_gradient"])


def changes_of(teacher: Teacher) -> list[str]:
    """The labels of all that the search may do to the teacher's blocks beside copying them."""
    search, unet = teacher.config.search, teacher.unet
    removals = without_kept(unet.kept_blocks, search.keep) if "remove" in search.actions else []
    return removals + offered_narrower(unet, search)


def timed(teacher: Teacher) -> str:
    """What the latency table has an entry of."""
    others = counted(offered_narrower(teacher.unet, teacher.config.search))
    return ", ".join(filter(None, (f"{len(teacher.unet.kept_blocks)} blocks", others)))


def counted(labels: Sequence[str]) -> str:
    actions = [Change.of(label).action for label in labels]
    return ", ".join(f"{actions.count(action)} {name}" for action, name in NAMES.items() if action in actions)


def evaluation(name: str, teacher: Teacher) -> Stage:
    config, images = teacher.config.eval, image_count(teacher.config)
    rows = images * image_rows(config.steps, config.guidance_scale)
    return Stage(place(name, config.steps, config.guidance_scale), f"{images} images", rows)


def latency_stage(teacher: Teacher) -> Stage:
    """At most: a GPU or compile=true times every block by a pair of UNets, a CPU all blocks at once."""
    config, blocks = teacher.latency, len(teacher.unet.kept_blocks)
    pairs = blocks + len(offered_narrower(teacher.unet, teacher.config.search)) + config.additive_samples
    work = f"{timed(teacher)}, {config.additive_samples} random removals, batch {config.batch}"
    return Stage("latency.json", work, 2 * pairs * (config.warmup + config.iterations) * config.batch)
