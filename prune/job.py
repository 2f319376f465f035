"""The pruning job: Algorithm 1 of SnapFusion, from a teacher pipeline to a slim diffusers folder and its report."""

import logging
import math

from slimstep.engine.planning import Plan
from slimstep.engine.run import Run
from slimstep.eval.plan import planned, scorer_stage
from slimstep.eval.scorer_check import check_scorer
from slimstep.models.architecture import as_json
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.prune.bench import PruneBench
from slimstep.prune.config import Config
from slimstep.prune.evolve import Action, BlockValue, apply, record_json
from slimstep.prune.plan import latency_stage, pruning_stages
from slimstep.prune.search import Situation

log = logging.getLogger("slimstep")
TARGET_MISSED = 3


def prune_unet(config: Config, run: Run) -> int | Plan:
    """Runs or continues the job, or tells what it would do; returns the exit code: 0, or 3 for a missed target."""
    bench = PruneBench(config, run)
    bench.check()
    if config.plan:
        return planned(bench, [*scorer_stage(bench), *pruning_stages(bench)], [config.train, config.recovery.train])
    check_scorer(bench)
    bench.keep_prompts()
    judged = [bench.judge("teacher", bench.teacher)]
    unet, decision, measured_ms = bench.student(), None, {}
    for r in range(config.search.rounds):
        unet, decision = evolve(bench, unet, decision, r)
        judged.append(bench.judge(f"round-{r:02d}", unet))
        measured_ms |= {"teacher": decision["teacher_ms"], f"round-{r:02d}": decision["measured_ms"]}
    bench.export(unet, "evolved")  # what recovery begins with: others can be recovered from it
    student = bench.train(unet, config.recovery.objective, config.recovery.train, "recovery").requires_grad_(False)
    judged.append(bench.judge("student", student))
    bench.export(student)
    bench.write_card(bench.evaluate(judged, {**measured_ms, "student": decision["measured_ms"]}))
    bench.report()
    if decision["target_ms"] and decision["measured_ms"] > decision["target_ms"]:
        log.warning(
            f"the latency target of {decision['target_ms']:.2f} ms was not reached: {decision['measured_ms']:.2f} ms "
            f"is the best effort, exported to {run.path / 'export'}; raise search.target_fraction or search.target_ms"
        )
        return TARGET_MISSED
    return 0


def make_latency_table(config: Config, run: Run) -> int | Plan:
    """The latency table of a model on its own, written to latency.json and printed."""
    bench = PruneBench(config, run)
    if config.plan:
        return planned(bench, [latency_stage(bench)], [])
    table = run.json("latency.json", lambda: bench.measure_latencies(bench.unet))
    for block, entry in table["sites"].items():
        log.info(f"{block:<52} {entry['ms']:9.3f} ms  {entry['ms'] / table['full_ms']:6.1%}")
    log.info(f"{run.path / 'latency.json'}: {table['full_ms']:.2f} ms for a batch of {bench.latency.batch}")
    return 0


def evolve(
    bench: PruneBench, unet: PrunableUNet2DConditionModel, previous: dict | None, r: int
) -> tuple[PrunableUNet2DConditionModel, dict]:
    """One round: robust training, block scores, latency table, decision, surgery."""
    config, run, stage = bench.config, bench.run, f"round-{r:02d}"
    unet = bench.train(unet, config.objective, config.train, stage)
    table = run.json(f"{stage}/latency.json", lambda: bench.measure_latencies(unet))
    scores = run.json(f"{stage}/scores.json", lambda: bench.score(unet, stage)) if bench.search.needs_scores else None
    followed = [f"judged/{stage}.json", f"round-{r + 1:02d}/weights.safetensors", "recovery/weights.safetensors"]
    if not run.made(f"{stage}/decision.json") and (orphans := [name for name in followed if run.made(name)]):
        raise ValueError(
            f"{run.path / stage}/decision.json is gone, and {', '.join(orphans)} follow from it: remove them too"
        )
    decision = run.json(f"{stage}/decision.json", lambda: decide(bench, unet, table, scores, previous, r))
    tell(stage, decision)
    return unet.with_architecture(decision["after"], copy_init=config.search.copy_init), decision


def decide(bench, unet, table: dict, scores: dict | None, previous: dict | None, r: int) -> dict:
    """A round's actions as JSON. The last round goes on until the *measured* latency meets the target."""
    config = bench.config.search
    teacher_ms = previous["teacher_ms"] if previous else table["full_ms"]
    latency_ms = previous["measured_ms"] if previous else table["full_ms"]
    target_ms = config.target_ms or (config.target_fraction and config.target_fraction * teacher_ms)
    values = block_values(unet, table, scores, scale=latency_ms / table["full_ms"])
    target = target_ms or math.inf
    situation = Situation(values, unet.architecture, latency_ms, target, unet.copyable_blocks, r, config.rounds)
    actions: list[Action] = []
    after, measured_ms = unet.architecture, latency_ms
    while more := bench.search(situation):
        actions += more
        after = apply(unet.architecture, actions)
        measured_ms = bench.measure_ms(unet.with_architecture(after), teacher_ms)
        if r < config.rounds - 1 or measured_ms <= situation.target_ms:
            break
        situation = situation.after(more, measured_ms)
    return {
        "before": as_json(unet.architecture),
        "after": as_json(after),
        "bypass": bench.skip_rule,
        "actions": [action.as_json() for action in actions],
        "values": [record_json(value) for value in values],
        "not_copyable": [block for block in unet.kept_blocks if block not in unet.copyable_blocks],
        "teacher_ms": teacher_ms,
        "target_ms": target_ms,
        "predicted_ms": actions[-1].as_json()["predicted_ms"] if actions else latency_ms,
        "measured_ms": measured_ms,
        "clock": "latency.table" if bench.known_latencies else "measured",
    }


def block_values(
    unet: PrunableUNet2DConditionModel, table: dict, scores: dict | None, scale: float
) -> tuple[BlockValue, ...]:
    """Scores and milliseconds side by side; `scale` carries the table over to the teacher's clock."""
    unknown = {"delta_clip": math.nan, "se": math.nan}
    return tuple(
        BlockValue(
            block,
            score["delta_clip"],
            score["se"],
            entry["ms"] * scale,
            unet.repeats(block),
            math.nan if score.get("picture_error") is None else score["picture_error"],
        )
        for block, entry in table["sites"].items()
        for score in [unknown if scores is None else scores["sites"][block]]
    )


def tell(stage: str, decision: dict) -> None:
    """The round as a story: what was done to which block, and why; the latency predicted, then measured."""
    for action in decision["actions"]:
        verb = {"remove": "removes", "copy": "copies"}[action["action"]]
        predicted = "" if action["predicted_ms"] is None else f" → predicted {action['predicted_ms']:.2f} ms"
        log.info(f"{stage} {verb} {action['site']:<32} {action['why']}{predicted}")
    share = decision["measured_ms"] / decision["teacher_ms"]
    target = f"target {decision['target_ms']:.2f} ms" if decision["target_ms"] else "no target"
    how = "measured" if decision["clock"] == "measured" else "by the table"
    log.info(f"{stage} {how} {decision['measured_ms']:.2f} ms, {share:.1%} of the teacher's ({target})")
