"""One round of the search: block scores, latency table, decision; each a file of the round that is not made again."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from slimstep.data.prompts import PromptSet
from slimstep.eval.evaluator import PARTIAL
from slimstep.eval.inputs import Teacher
from slimstep.eval.metrics.metric import Metric
from slimstep.eval.pages.cautions import score_cautions
from slimstep.eval.pages.runs import ranked_by
from slimstep.eval.timing.latency import compare_ms
from slimstep.models.architecture import as_json
from slimstep.models.families.prunable import Prunable
from slimstep.prune.changed import Labels, offered_narrower
from slimstep.prune.changes import Change, without_kept
from slimstep.prune.config import MEASURED, Config
from slimstep.prune.evolve import Action, BlockValue, apply, priced, record_json
from slimstep.prune.interactions import (
    beyond_sum,
    candidates,
    found_pairs,
    interactions_of,
    pair_record,
    random_sets,
)
from slimstep.prune.latency import latency_table, predicted_ms, read_table, table_without
from slimstep.prune.local_recovery import recovery_training, score_recovered
from slimstep.prune.racing import record_of, run_race, why_stopped
from slimstep.prune.scores import Drawing, score_blocks, score_record
from slimstep.prune.screening import Screen, screen_blocks
from slimstep.prune.search import Situation, measured_sets, needs_similarity
from slimstep.prune.sets import MeasuredSets
from slimstep.prune.similarity import block_similarities

log = logging.getLogger("slimstep")
VERBS = {"remove": "removes", "narrow": "narrows", "quantize": "quantizes", "merge": "merges", "copy": "copies"}


def known_latencies(config: Config) -> dict | None:
    """The table of the teacher that the configuration names, if it names one."""
    return read_table(config.latency.table) if config.latency.table else None


def skip_rule(config: Config) -> str | dict[str, str]:
    """What is left of removed ResNets, as search.skip_rule says."""
    rule = config.search.skip_rule
    return OmegaConf.to_container(rule) if OmegaConf.is_config(rule) else rule


@dataclass(frozen=True)
class Measures:
    """What rounds measure networks by; blocks by `search.metric`, one of `metrics`. For a latency table alone the
    teacher is enough."""

    teacher: Teacher
    search: Any = None
    calibration: PromptSet | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def latencies(self, unet: Prunable) -> dict:
        """The latency table of `unet`: measured by rank 0 for all, or taken from the table there is."""
        teacher = self.teacher
        narrower = offered_narrower(unet, teacher.config.search)
        if known := known_latencies(teacher.config):
            return table_without(known, unet, narrower)
        table = teacher.run.of_rank_0(lambda: latency_table(unet, teacher.latency, teacher.device, narrower))
        error = table["additive_error"]
        say = log.warning if error["median"] > 0.1 else log.info
        say(
            f"latency table ({table['method']}, {table['mode']}): {table['full_ms']:.2f} ms; sums of its entries miss "
            f"the measured time by {error['median']:.1%} (median), {error['p95']:.1%} (95 %) on {error['n']} removals"
        )
        return table

    def ms(self, unet: Prunable, teacher_ms: float) -> float:
        """The latency of `unet` on the teacher's clock: the ratio of the two, interleaved, times `teacher_ms`.

        Timed by rank 0 alone; predicted where the table was made elsewhere.
        """
        teacher = self.teacher
        if known := known_latencies(teacher.config):
            return predicted_ms(known, unet)
        unets = {"teacher": teacher.unet, "unet": unet}
        times = teacher.run.of_rank_0(lambda: compare_ms(unets, teacher.latency, teacher.device))
        return teacher_ms * times["unet"] / times["teacher"]

    def similarities(self, unet: Prunable, stage: str) -> dict:
        """Those of the blocks of `unet`, and what they were measured with."""
        teacher, scoring, prompts = self.teacher, self.teacher.config.scoring, self.calibration
        sampler, keep = teacher.sampler(scoring), teacher.run.path / PARTIAL / f"{stage}-similarities"
        found = block_similarities(unet, sampler, prompts, scoring.batch_size, teacher.run.accelerator, keep)
        return {"protocol": {"prompts_hash": prompts.hash, **sampler.protocol}, "blocks": found}

    def screen(self, unet: Prunable, stage: str, changes: Sequence[Labels]) -> Screen:
        """What one evaluation after each change tells (screening.py)."""
        teacher, scoring = self.teacher, self.teacher.config.scoring
        shared = scoring.batch_size, teacher.run.accelerator, teacher.run.path / PARTIAL / stage
        return screen_blocks(unet, teacher.sampler(scoring), self.calibration, *shared, changes)

    def scores(self, unet: Prunable, stage: str, situation: Situation) -> dict:
        """The block scores of `unet` with their protocol. Where the round has nothing to save blocks are copied, of
        which no screen tells, and no race."""
        protocol = self.teacher.config.scoring.protocol
        excess_ms = situation.latency_ms - situation.goal_ms
        has_excess = 0 < excess_ms < math.inf
        if protocol == "racing" and has_excess:
            record = self.raced(unet, stage, situation)
        else:
            ms = {value.change.label: value.saved_ms for value in situation.values}
            record = self.scored(unet, stage, ms, excess_ms if protocol == "screened" and has_excess else None)
        agreement = record["rank_agreement_of_halves"]
        halves = "" if agreement is None else f"; halves of the prompts rank the blocks alike with ρ = {agreement:.2f}"
        log.info(f"{ranked_by(record)} {record['base']['clip']:.2f} ± {record['base']['se']:.2f}{halves}")
        if (recovery := record.get("recovery")) and (agreement := recovery["rank_agreement_with_before"]) is not None:
            after = f"{recovery['steps']} steps of local recovery"
            log.info(f"{stage} scores before and after {after} rank the changes alike with ρ = {agreement:.2f}")
        for doubt in score_cautions(record):
            log.warning(f"{stage}: {doubt}")
        return record

    def protocol(self, name: str) -> dict[str, Any]:
        """What scores are measured with."""
        prompts, metric = self.calibration, self.teacher.config.search.metric
        named = {} if metric == "clip" else {"metric": metric}
        own = {"name": name, "prompts_hash": prompts.hash, "n": len(prompts.distinct), **named}
        return {**own, **self.metrics[metric].protocol, **self.teacher.sampler(self.teacher.config.scoring).protocol}

    def raced(self, unet: Prunable, stage: str, situation: Situation) -> dict:
        """By a race (racing.py), in which the search decides on what is known so far."""
        teacher, scoring, prompts = self.teacher, self.teacher.config.scoring, self.calibration
        sampler, metric = teacher.sampler(scoring), self.metrics[teacher.config.search.metric]
        labels = [value.change.label for value in situation.values]
        places = {label: n for n, label in enumerate(labels)}

        def choose(lost: Sequence[float]) -> set[int]:
            values = (replace(v, delta_clip=x, se=0.0) for v, x in zip(situation.values, lost, strict=True))
            return {places[action.change.label] for action in self.search(replace(situation, values=tuple(values)))}

        racing = PromptSet(prompts.distinct[: scoring.race_prompts], prompts.name)  # a text's other noises are left out
        shared = scoring.batch_size, teacher.run.accelerator
        keep = teacher.run.path / PARTIAL / f"{stage}-race"
        screen = screen_blocks(unet, sampler, racing, *shared, keep, labels)
        drawing = Drawing(unet, sampler, metric, racing, *shared, screen.latents_PCHW)
        errors = [screen.errors[label] for label in labels]
        race = run_race(drawing, labels, errors, choose, scoring.tolerance, teacher.config.seed, keep)
        log.info(f"{stage} scores are settled: {why_stopped(race, scoring.tolerance)}")
        record = score_record(self.protocol("racing"), race.base_P, race.rows(), race.others_psnr, None)
        return record | {"race": record_of(race, scoring.tolerance, sampler.evaluations(unet))}

    def sets(self, unet: Prunable, stage: str) -> MeasuredSets:
        """What measures whole sets of changes of the round's network."""
        teacher, scoring, prompts = self.teacher, self.teacher.config.scoring, self.calibration
        metric = self.metrics[teacher.config.search.metric]
        shared = teacher.sampler(scoring), metric, prompts, scoring.batch_size, teacher.run.accelerator
        return MeasuredSets(teacher.run, stage, Drawing(unet, *shared), prompts)

    def interactions(self, unet: Prunable, stage: str, situation: Situation, scores: dict) -> dict:
        """What pairs of changes lose beyond the sum (interactions.py), with what the random sets lost."""
        config, prompts = self.teacher.config, self.calibration
        keep, excess_ms = self.teacher.run.path / PARTIAL, situation.latency_ms - situation.goal_ms
        labels = candidates(situation.values, excess_ms, config.search.interactions)
        drawn = random_sets(labels, config.search.interactions, config.seed, situation.round_index)
        measured = self.sets(unet, stage)
        if config.search.interactions_by == "images":
            table_SP = measured.lost(drawn, keep / f"{stage}-random-sets")
            lost_S = table_SP.mean(1).numpy()
        else:
            lost_S = np.array([*self.screen(unet, f"{stage}-random-sets", drawn).errors.values()])
        taken_SN = np.array([[label in of for label in labels] for of in drawn]).reshape(len(drawn), len(labels))
        pairs = [(found, (labels[i], labels[j])) for found in found_pairs(taken_SN, lost_S) for i, j in [found.pair]]
        rows = {**scores["sites"], **scores.get("narrower", {})}
        whole = {label: row["per_prompt"] for label, row in rows.items() if row["n"] == len(prompts.distinct)}

        def alone(label: str) -> Sequence[float]:
            return whole[label] if label in whole else measured.row((label,))["per_prompt"]

        records = [pair_record(pair, found, measured.row(pair)["per_prompt"], [alone(label) for label in pair])
                   for found, pair in pairs]  # fmt: skip
        clear = sum(record["used"] for record in records)
        log.info(f"{stage}: of {len(labels)} changes in {len(drawn)} random sets {len(records)} pairs stand out, of "
                 f"which {clear} clearly lose more or less than their sum by images")  # fmt: skip
        sets = [[labels.index(label) for label in of] for of in drawn]
        protocol = {**self.protocol("interactions"), "by": config.search.interactions_by}
        return {"protocol": protocol, "changes": labels, "sets": sets, "lost": lost_S.tolist(), "pairs": records}

    def scored(self, unet: Prunable, stage: str, ms: Mapping[str, float], screened_ms: float | None) -> dict:
        """Every change on all prompts; or, with what the round has to save, those that a screen leaves. ms: what each
        change saves, by its label."""
        teacher, scoring, prompts = self.teacher, self.teacher.config.scoring, self.calibration
        screen: Screen | None = None
        chosen: dict[str, Any] = {"blocks": tuple(ms)}
        if screened_ms is not None:
            screen = self.screen(unet, stage, tuple(ms))
            cheapest = screen.cheapest(ms, scoring.screen_margin * screened_ms)
            chosen = {"blocks": cheapest, "latents_PCHW": screen.latents_PCHW}
            log.info(f"{stage} scores {len(cheapest)} of {len(ms)} changes: a screen found them cheapest")
        sampler, keep = teacher.sampler(scoring), teacher.run.path / PARTIAL / stage
        accelerator, metric = teacher.run.accelerator, self.metrics[teacher.config.search.metric]
        if scoring.recovery_steps:
            training, labels = recovery_training(scoring), chosen["blocks"]
            own = training, teacher.config.seed, accelerator, keep, labels
            table = score_recovered(unet, sampler, metric, prompts, *own)
        else:
            table = score_blocks(unet, sampler, metric, prompts, scoring.batch_size, accelerator, keep, **chosen)
        record = table.record(self.protocol("screened" if screen else "snapfusion"))
        return record | ({"screen": dict(screen.errors)} if screen else {})


def decide(measures: Measures, unet: Prunable, previous: dict | None, r: int) -> dict:
    """What the round's latencies and scores say to do, in its decision.json."""
    run, stage = measures.teacher.run, f"round-{r:02d}"
    table = run.json(f"{stage}/latency.json", lambda: measures.latencies(unet))
    teacher_ms = previous["teacher_ms"] if previous else table["full_ms"]  # the first round's, for all
    latency_ms = previous["measured_ms"] if previous else table["full_ms"]
    situation = situation_of(measures, unet, table, latency_ms, teacher_ms, r)
    if measures.search.needs_scores and situation.values:
        scores = run.json(f"{stage}/scores.json", lambda: measures.scores(unet, stage, situation))
        situation = replace(situation, values=scored_values(situation.values, scores))
        if measures.teacher.config.search.interactions and 0 < situation.latency_ms - situation.goal_ms < math.inf:
            pairs = run.json(
                f"{stage}/interactions.json", lambda: measures.interactions(unet, stage, situation, scores)
            )
            situation = replace(situation, interactions=interactions_of(pairs))
    if needs_similarity(measures.search):
        alike = run.json(f"{stage}/similarities.json", lambda: measures.similarities(unet, stage))["blocks"]
        situation = replace(situation, similarities=alike)
    followed = [f"evaluation/{stage}", f"round-{r + 1:02d}/weights.safetensors", "recovery/weights.safetensors"]
    if not run.made(f"{stage}/decision.json") and (orphans := [name for name in followed if run.made(name)]):
        raise ValueError(
            f"{run.path / stage}/decision.json is gone, and {', '.join(orphans)} follow from it: remove them too"
        )
    return run.json(f"{stage}/decision.json", lambda: decision(measures, unet, situation, teacher_ms))


def situation_of(
    measures: Measures, unet: Prunable, table: dict, latency_ms: float, teacher_ms: float, r: int
) -> Situation:
    """What is known of a round before its blocks are scored; `table` is carried over to the teacher's clock."""
    config = measures.teacher.config.search
    target_ms = config.target_ms or (config.target_fraction and config.target_fraction * teacher_ms) or math.inf
    scale, entries = latency_ms / table["full_ms"], table["sites"] if "remove" in config.actions else {}
    if {*MEASURED} & {*config.actions} and measures.search.needs_scores:
        entries = entries | table.get("narrower", {})  # not there where nothing is left to narrow
    changes = {label: Change.of(label) for label in without_kept(entries, config.keep)}
    unknown = math.nan, math.nan
    values = tuple(
        BlockValue(c.block, *unknown, entries[label]["ms"] * scale, unet.repeats(c.block), part=c.part, share=c.share)
        for label, c in changes.items()
    )
    copyable = unet.copyable_blocks if "copy" in config.actions else ()
    return Situation(values, unet.architecture, latency_ms, target_ms, copyable, r, config.rounds)


def scored_values(values: Sequence[BlockValue], scores: dict) -> tuple[BlockValue, ...]:
    """The values with what scores.json says of their blocks; a screen may have left some unscored."""

    screen, rows = scores.get("screen", {}), {**scores["sites"], **scores.get("narrower", {})}

    def scored(value: BlockValue) -> BlockValue:
        label = value.change.label
        value = replace(value, screen_error=screen.get(label, math.nan), metric=ranked_by(scores))
        if label in screen and label not in rows:
            return value
        score = rows[label]
        error = math.nan if score.get("picture_error") is None else score["picture_error"]
        at_once = score.get("before_recovery", {}).get("delta_clip", math.nan)
        return replace(value, delta_clip=score["delta_clip"], se=score["se"], picture_error=error, at_once=at_once)

    return tuple(map(scored, values))


def decision(measures: Measures, unet: Prunable, situation: Situation, teacher_ms: float) -> dict:
    """A round's actions as JSON. The last round goes on until the *measured* latency meets the target."""
    values, latency_ms, target_ms = situation.values, situation.latency_ms, situation.target_ms
    is_last = situation.round_index == situation.rounds - 1
    actions: list[Action] = []
    sets = measures.sets(unet, f"round-{situation.round_index:02d}") if measured_sets(measures.search) else None
    first = situation = replace(situation, measure=sets)
    after, measured_ms = unet.architecture, latency_ms
    while more := measures.search(situation):
        actions += more
        after = apply(unet.architecture, actions)
        measured_ms = measures.ms(unet.with_architecture(after), teacher_ms)
        if not is_last or measured_ms <= target_ms:
            break
        situation = situation.after(more, measured_ms)
    return {
        "before": as_json(unet.architecture),
        "after": as_json(after),
        "bypass": skip_rule(measures.teacher.config),
        "actions": list(map(record_json, actions)),
        "values": [record_json(value) for value in values],
        "not_copyable": [block for block in unet.kept_blocks if block not in unet.copyable_blocks],
        "teacher_ms": teacher_ms,
        "target_ms": target_ms if math.isfinite(target_ms) else None,
        "predicted_ms": record_json(actions[-1])["predicted_ms"] if actions else latency_ms,
        "measured_ms": measured_ms,
        "clock": "latency.table" if known_latencies(measures.teacher.config) else "measured",
        **({"finalists": finalist_records(first, sets.rows, actions)} if sets and sets.rows else {}),
    }


def finalist_records(
    situation: Situation, rows: Mapping[tuple[str, ...], dict], actions: Sequence[Action]
) -> list[dict[str, Any]]:
    """The sets that were measured by images: what each was predicted to lose, by the sum and its pairs, and lost."""
    values = {value.change.label: value for value in priced(situation.values)}
    taken = tuple(sorted(action.change.label for action in actions))
    return [
        {
            "changes": list(labels),
            "predicted_ms": situation.latency_ms - sum(values[label].saved_ms for label in labels),
            "predicted": sum(max(values[label].price, 0.0) for label in labels)
            + beyond_sum(situation.interactions, labels),
            "measured": row["delta_clip"],
            "se": row["se"],
            "picture_error": row["picture_error"],
            "taken": labels == taken,
        }
        for labels, row in rows.items()
    ]


def action_label(action: Mapping[str, Any]) -> str:
    """The label of the change in a decision.json, of a copy its block."""
    return Change(action["site"], action.get("part"), action.get("share", 0.0)).label


def tell(stage: str, decision: dict) -> None:
    """The round as a story: what was done to which block, and why; the latency predicted, then measured."""
    for action in decision["actions"]:
        verb = VERBS[action["action"]]
        predicted = "" if action["predicted_ms"] is None else f" → predicted {action['predicted_ms']:.2f} ms"
        log.info(f"{stage} {verb} {action_label(action):<32} {action['why']}{predicted}")
    share = decision["measured_ms"] / decision["teacher_ms"]
    target = f"target {decision['target_ms']:.2f} ms" if decision["target_ms"] else "no target"
    how = "measured" if decision["clock"] == "measured" else "by the table"
    log.info(f"{stage} {how} {decision['measured_ms']:.2f} ms, {share:.1%} of the teacher's ({target})")
