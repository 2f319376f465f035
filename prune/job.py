"""The pruning job: Algorithm 1 of SnapFusion, from a teacher pipeline to a slim diffusers folder and its report."""

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from slimstep.data.prompts import PromptSet
from slimstep.engine.components import component
from slimstep.engine.planning import Plan
from slimstep.engine.run import Run
from slimstep.eval.evaluator import Candidate, Evaluator
from slimstep.eval.exporting import export, result_line, write_results
from slimstep.eval.inputs import (
    Teacher,
    check_inputs,
    check_weights,
    load_metrics,
    load_prompts,
    load_scorer,
    load_teacher,
    of_what_is_drawn,
    offloadable,
    seen_prompts,
    training_pairs,
)
from slimstep.eval.metrics.metric import Metric, Psnr, of_kind
from slimstep.eval.pages.comparison import run_table
from slimstep.eval.pages.evaluation_page import models_table, write_evaluation_report
from slimstep.eval.pages.run_page import write_report
from slimstep.eval.pages.runs import read_run
from slimstep.eval.plan import planned, scorer_stage
from slimstep.eval.record import Evaluation
from slimstep.eval.reporting import report
from slimstep.eval.scorer_check import check_scorer
from slimstep.eval.training import check_objective, train_stage
from slimstep.models.cost import count_gflops, count_parameters
from slimstep.models.denoiser import guidance_embed_dim
from slimstep.models.families.prunable import Prunable, fields_of
from slimstep.models.families.quantized import check_computes
from slimstep.models.families.transformer.network import PrunableTransformer
from slimstep.models.family import denoiser_of, family_of
from slimstep.models.pipeline import on_device, with_unet
from slimstep.prune.budgets import front
from slimstep.prune.changed import offered_narrower
from slimstep.prune.changes import without_kept
from slimstep.prune.config import MEASURED, Config
from slimstep.prune.latency import predicted_ms, table_without
from slimstep.prune.plan import latency_stage, pruning_stages
from slimstep.prune.rounds import Measures, decide, known_latencies, skip_rule, tell
from slimstep.prune.search import measured_sets, needs_similarity, ranks_by_prompts, takes_interactions

log = logging.getLogger("slimstep")
TARGET_MISSED = 3


def prune_unet(config: Config, run: Run) -> int | Plan:
    """Runs or continues the job, or says what it would do; returns the exit code: 0, or 3 for a missed target."""
    teacher, search = load_teacher(config, run), component(config, "search.method", _convert_="all")
    divide_blocks(teacher)
    check(teacher, search)
    (calibration, prompts), scorer = load_prompts(teacher), load_scorer(config, run.accelerator.device)
    unets = {"teacher": teacher.unet}
    evaluator = evaluator_of(teacher, unets, prompts, scorer)
    check_metric(config, evaluator.metrics)
    if config.plan:
        checked = scorer_stage(run) if teacher.is_conditional else []
        stages = [*checked, *pruning_stages(teacher, search)]
        return planned(teacher, stages, [config.train, config.recovery.train])
    if teacher.is_conditional:
        check_scorer(teacher.config, run, scorer)
    ranking = list(calibration.distinct) if ranks_by_prompts(search) else []
    run.json("prompts.json", lambda: {"calibration_prompts": ranking, "eval_prompts": list(prompts.distinct)})
    pairs, offloaded = training_pairs(teacher, prompts), offloadable(teacher.pipeline, scorer)
    own = {"pairs": pairs, "offloadable": offloaded, **at_its_guidance(teacher)}
    train = partial(train_stage, teacher=teacher, **own)
    setting = config.eval.steps, config.eval.guidance_scale
    points, times = [evaluator.point("teacher", *setting)], {}
    measures = Measures(teacher, search, calibration, evaluator.metrics)
    unet, decision = prunable_copy(teacher), None
    for r in range(config.search.rounds):
        stage = f"round-{r:02d}"
        unet = train(unet, stage, config.objective, config.train)
        decision = decide(measures, unet, decision, r)
        tell(stage, decision)
        if r == 0 and run.made(f"{stage}/scores.json"):
            run.json(f"{stage}/budgets.json", lambda: front(run.path))
        unet = unets[stage] = unet.with_architecture(decision["after"], copy_init=config.search.copy_init)
        points.append(evaluator.point(stage, *setting))
        times |= {"teacher": decision["teacher_ms"], stage: decision["measured_ms"]}
    export(with_unet(teacher.pipeline, unet), "evolved", teacher)  # others can be recovered from it
    unet = unets["student"] = train(unet, "recovery", config.recovery.objective, config.recovery.train)
    points.append(evaluator.point("student", *setting))
    export(with_unet(teacher.pipeline, unet.requires_grad_(False)), "export", teacher)
    times["student"] = decision["measured_ms"]
    protocol = {**(scorer.protocol if scorer else {}), **teacher.sampler(config.eval).protocol}
    evaluation = evaluator.evaluate(points, dict(zip(unets, unets, strict=True)), protocol, seen_prompts(run), ms=times)
    write_results(run, "export", results(teacher, evaluation))
    if teacher.is_conditional:
        report(run, partial(write_page, run), partial(run_table, run.path))
    else:
        report(run, partial(write_evaluation_report, run.path), lambda: models_table(evaluation.points).markdown)
    return missed_target(run, decision)


def make_latency_table(config: Config, run: Run) -> int | Plan:
    """The latency table of a model on its own, written to latency.json and printed."""
    teacher = Teacher(component(config, "model"), config, run)
    divide_blocks(teacher)
    check_actions(teacher)
    if config.plan:
        return planned(teacher, [latency_stage(teacher)], [])
    check_weights(teacher.pipeline, config)
    table = run.json("latency.json", lambda: Measures(teacher).latencies(teacher.unet))
    for block, entry in table["sites"].items():
        log.info(f"{block:<52} {entry['ms']:9.3f} ms  {entry['ms'] / table['full_ms']:6.1%}")
    log.info(f"{run.path / 'latency.json'}: {table['full_ms']:.2f} ms for a batch of {teacher.latency.batch}")
    return 0


def divide_blocks(teacher: Teacher) -> None:
    """Makes sublayers blocks, too, where search.blocks says so; ValueError where there are none."""
    if teacher.config.search.blocks == "sublayers":
        if not isinstance(teacher.unet, PrunableTransformer):
            kind = teacher.unet.STOCK.__name__
            raise ValueError(f"search.blocks=sublayers is for transformers; a {kind} has its ResNets and attentions")
        teacher.unet.divide_blocks()


def check(teacher: Teacher, search: Any) -> None:
    """ValueError, before anything is made, for a search, data or objectives that will not do."""
    config, unet = teacher.config, teacher.unet
    scales = {config.eval.guidance_scale, *([config.scoring.guidance_scale] if ranks_by_prompts(search) else [])}
    if guidance_embed_dim(unet) and len(scales) > 1:
        name, (scale, other) = config.model.name_or_path, (config.eval.guidance_scale, config.scoring.guidance_scale)
        takes = f"{name} takes its guidance scale as an input, and is pruned for one: eval.guidance_scale={scale:g}"
        raise ValueError(f"{takes}, which scoring.guidance_scale={other:g} must be, too")
    known = (*unet.all_blocks, *unet.levels)
    if unknown := sorted(set(search.named_blocks) - set(known)):
        raise ValueError(f"search.method names unknown blocks {unknown}; this network has {known}")
    if (decided := getattr(search, "skip_rule", None)) not in (None, skip_rule(config)):
        raise ValueError(f"search.method.architecture was decided with search.skip_rule={decided}; set it here")
    if config.search.blocks == "sublayers" and needs_similarity(search):
        raise ValueError("search=similarity compares the input and output of whole blocks: set search.blocks=whole")
    if unused := [pattern for pattern in config.search.keep if not fnmatch.filter(unet.all_blocks, pattern)]:
        raise ValueError(f"search.keep={unused} names no block; this network has {unet.all_blocks}")
    if unet.all_blocks and not without_kept(unet.all_blocks, config.search.keep):
        raise ValueError(f"search.keep={list(config.search.keep)} names all blocks: there is nothing to prune")
    check_measurements(config, search)
    check_actions(teacher)
    if table := known_latencies(config):
        table_without(table, unet, offered_narrower(unet, config.search))
    with torch.device("meta"):
        bare = type(unet).from_config(fields_of(unet), bypass=skip_rule(config))
        if architecture := getattr(search, "architecture", {}):
            for dtype in {spec.dtype for spec in architecture.values() if spec.dtype}:
                check_computes(dtype, teacher.device)
            decided = type(unet).from_config(fields_of(bare), depths=architecture)
            if table:
                predicted_ms(table, decided)
    for key, stage in {"objective": config, "recovery.objective": config.recovery}.items():
        check_objective(key, stage.objective, stage.train, teacher, **at_its_guidance(teacher))
    check_inputs(teacher)
    if ranks_by_prompts(search):
        teacher.sampler(config.scoring)


def check_measurements(config: Config, search: Any) -> None:
    """ValueError for actions and measurements that the search has no use for."""
    name = type(search).__name__
    pairs, steps = config.search.interactions, config.scoring.recovery_steps
    if {*MEASURED} & {*config.search.actions} and not search.needs_scores:
        why = f"{name} scores nothing, and removes whole blocks alone; choose search=snapfusion, program or evolution"
        raise ValueError(f"search.actions={list(config.search.actions)}: {why}")
    if pairs and not takes_interactions(search):
        why = f"{name} adds up losses of single changes; choose search=program or evolution, or set 0"
        raise ValueError(f"search.interactions={pairs}: {why}")
    if steps and not search.needs_scores:
        why = f"{name} scores nothing; choose search=snapfusion or program, or scoring.recovery_steps=0"
        raise ValueError(f"scoring.recovery_steps={steps}: {why}")
    if steps and (pairs or measured_sets(search)):
        sets = "search.interactions" if pairs else name
        why = f"{sets} measures sets of changes before any recovery, which no score after it can be compared with"
        raise ValueError(f"scoring.recovery_steps={steps}: {why}; choose snapfusion, or program without pairs")


def check_actions(teacher: Teacher) -> None:
    """ValueError for actions that the network has no blocks for, and dtypes that the device does not compute in."""
    search, kind = teacher.config.search, teacher.unet.STOCK.__name__
    if "merge" in search.actions and not teacher.unet.mergeable_blocks:
        reason = f"a {kind} has no self-attention that can merge tokens; leave merge out"
        raise ValueError(f"search.actions={list(search.actions)}: {reason}")
    for dtype in search.dtypes if "quantize" in search.actions else ():
        check_computes(dtype, teacher.device)


def at_its_guidance(teacher: Teacher) -> dict[str, Any]:
    """Further arguments of objectives: how a network that takes its guidance scale as an input (LCM) is called, at the
    scale that it is evaluated with; of others none."""
    if not guidance_embed_dim(teacher.unet):
        return {}
    denoiser = denoiser_of(teacher.unet, teacher.schedule.prediction_type)
    return {"denoiser": replace(denoiser, guidance=teacher.config.eval.guidance_scale)}  # type: ignore[type-var]


def check_metric(config: Config, metrics: Mapping[str, Metric]) -> None:
    """ValueError where blocks cannot be ranked by the metric that search.metric names."""
    known = of_kind(metrics, "per_image", "paired")
    known = [name for name, metric in known.items() if metric.reads == "images"]
    if config.search.metric not in known:
        raise ValueError(f"search.metric={config.search.metric} scores no single images; choose from {known}")


def prunable_copy(teacher: Teacher) -> Prunable:
    """A trainable copy of the teacher's network, in float32, on the CPU."""
    with on_device(teacher.unet, "cpu"):
        unet = type(teacher.unet).from_unet(teacher.unet, skip_rule=skip_rule(teacher.config))
    return unet.float().requires_grad_()


def evaluator_of(teacher: Teacher, unets: Mapping[str, Prunable], prompts: PromptSet, scorer: Any) -> Evaluator:
    """Every network in the teacher's pipeline; `unets` grows while the job goes on."""
    config, sampler = teacher.config, teacher.sampler(teacher.config.eval)
    codec = family_of(teacher.pipeline).codec(teacher.pipeline)
    decoder = {"decoder": count_parameters(codec.decoder)} if codec else {}

    def candidate(name: str, *_: Any) -> Candidate:
        unet = unets[name]
        facts = {"parameters": {"UNet": unet.num_parameters(), **decoder},
                 "gflops": count_gflops(unet, tokens=teacher.text_length),
                 "evaluations": sampler.evaluations(unet)}  # fmt: skip
        reseeded = lambda seed: partial(sampler.reseeded(seed).images, unet, prompts.prompts)  # noqa: E731
        return Candidate(reseeded(sampler.seed), sampler.protocol, facts, reseeded=reseeded)

    of_prompts = teacher.is_conditional, teacher.has_captions
    metrics = {**load_metrics(config, scorer, teacher.device, *of_prompts), "psnr": Psnr()}
    metrics = of_what_is_drawn(metrics, teacher.draws_videos, scorer)
    return Evaluator(config, teacher.run, candidate, prompts, metrics, scorer, ("teacher", config.eval.steps))


def results(teacher: Teacher, evaluation: Evaluation) -> Sequence[str]:
    """The student's scores and milliseconds, for its model card."""
    config, ms = teacher.config.latency, evaluation.facts["ms"]
    times = f"Denoiser: {ms['student']:.2f} ms, the teacher's {ms['teacher']:.2f} ms, for a batch of {config.batch}"
    clock = f"by the table {config.table}" if config.table else f"measured on {evaluation.environment['device']}"
    return [result_line(evaluation.points[-1]), f"{times} ({clock})"]


def write_page(run: Run) -> None:
    """The page; block values as tables and the pictures of every model, for a tracker if there is one."""
    record = read_run(run.path)
    lost = f"{record.ranked_by} lost"
    for r in record.rounds if run.tracker else ():
        rows = [[b.path, b.ms, b.delta_clip, b.se, b.clip_per_ms] for b in r.blocks.values()]
        run.tracker.table(f"{r.name}/blocks", ["block", "ms", lost, "se", f"{lost} per ms"], rows)
    for name, paths in record.images.items() if run.tracker else ():
        run.tracker.images(f"images/{name}", [Image.open(path) for path in paths], list(record.prompts))
    write_report(run.path)


def missed_target(run: Run, decision: Mapping[str, Any]) -> int:
    """The exit code: 3 where the last round did not reach the latency target, else 0."""
    if not decision["target_ms"] or decision["measured_ms"] <= decision["target_ms"]:
        return 0
    log.warning(
        f"the latency target of {decision['target_ms']:.2f} ms was not reached: {decision['measured_ms']:.2f} ms "
        f"is the best effort, exported to {run.path / 'export'}; raise search.target_fraction or search.target_ms"
    )
    return TARGET_MISSED
