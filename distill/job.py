"""The distilling job (SnapFusion, section 4): from a teacher's 32 steps to few in stages, each a pipeline."""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimstep.data.folder import few
from slimstep.data.prompts import PromptSet
from slimstep.data.shards import CachedPairs
from slimstep.distill.cached_targets import TargetInputs, with_targets
from slimstep.distill.checks import check
from slimstep.distill.config import Config
from slimstep.distill.network import Distillation, distillation_of, in_low_precision
from slimstep.distill.plan import distilling_stages, trained_beside, trainings
from slimstep.distill.stages import DistillationStage
from slimstep.engine.environment import environment
from slimstep.engine.objective import Objective, requirements
from slimstep.engine.planning import Plan
from slimstep.engine.run import Run
from slimstep.eval.evaluator import PARTIAL, Candidate, Evaluator
from slimstep.eval.exporting import export, export_low_rank, result_line, write_results
from slimstep.eval.inputs import (
    load_metrics,
    load_prompts,
    load_scorer,
    load_teacher,
    of_what_is_drawn,
    offloadable,
    real_distance,
    seen_prompts,
    training_pairs,
)
from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.metric import FeatureSimilarity, Psnr, SampleError
from slimstep.eval.monitoring import ImageMonitor
from slimstep.eval.overlap import among, read_calibration_prompts
from slimstep.eval.pages.evaluation_page import models_table, write_evaluation_report
from slimstep.eval.pages.steps_page import OTHER_SAMPLERS, curves_table, points_table, timed_points, write_steps_report
from slimstep.eval.plan import planned, scorer_stage
from slimstep.eval.record import Evaluation, Point
from slimstep.eval.reporting import report, track_table
from slimstep.eval.sampling import Sampler
from slimstep.eval.scorer_check import check_scorer
from slimstep.eval.timing.latency import compare_ms
from slimstep.eval.training import compute_copy, train_stage
from slimstep.models.families.prunable import Prunable
from slimstep.models.guidance import with_guidance_embedding
from slimstep.models.networks import with_trained_steps
from slimstep.models.pipeline import on_device, with_unet

log = logging.getLogger("slimstep")
UNets = dict[str, Prunable]


def distill_steps(config: Config, run: Run) -> int | Plan:
    """Runs or continues the job, or says what it would do; returns exit code 0."""
    job = distillation_of(load_teacher(config, run))
    check(job)
    (calibrating, prompts), scorer = load_prompts(job.teacher), load_scorer(config, run.accelerator.device)
    calibration = calibration_prompts(job, prompts)
    if config.plan:
        checked = scorer_stage(run) if job.teacher.is_conditional else []
        return planned(job.teacher, [*checked, *distilling_stages(job)], trainings(job), trained_beside(job))
    if job.teacher.is_conditional:
        check_scorer(job.teacher.config, run, scorer)
    pairs = training_pairs(job.teacher, prompts)
    train = partial(trained_copy, job, pairs, [*offloadable(job.teacher.pipeline, scorer)])
    monitor = partial(stage_monitor, job, calibrating, scorer if job.teacher.has_captions else None)
    unets = converted_to_v(job, train)
    if job.distillation.recover:
        recovery, teaching = config.recovery, partial(compute_copy, unets["teacher"], job.teacher)
        unets["student"] = train(unets["student"], recovery.objective, recovery.train, "repair", teaching=teaching)
    for stage in job.stages:
        unets[stage.name] = distilled(job, stage, unets, pairs, train, monitor(stage))
        student = with_unet(job.teacher.pipeline, unets[stage.name], scheduler=job.student_scheduler(stage.steps))
        if job.requires.own_times_only:
            student = with_trained_steps(student, stage.steps)
        guidance = job.sampled_guidance(stage.name, job.compared_guidance(stage.name))
        export(student, f"{stage.name}/export", job.teacher, stage.steps, guidance)
        if job.is_low_rank_of_teacher(stage):
            export_low_rank(student, stage.name, run)
    evaluation = evaluated(job, unets, prompts, scorer, calibration)
    for point in evaluation.points:
        if point.model == f"steps-{point.steps}" and point.guidance == job.compared_guidance(point.model):
            line = f"{result_line(point)} (the teacher at {job.distillation.steps[0]} steps)"
            write_results(run, f"{point.model}/export", [line])
    measure_unets(job, unets)
    if job.teacher.is_conditional:
        report(run, partial(write_page, run), lambda: curves_table(evaluation.points))
    else:
        report(run, partial(write_evaluation_report, run.path), lambda: models_table(evaluation.points).markdown)
    return 0


# ---- training ----


def trained_copy(
    job: Distillation,
    pairs: Callable[[], CachedPairs],
    offloadable: list[torch.nn.Module],
    unet: Prunable,
    objective: Mapping[str, Any],
    config: Any,
    stage: str,
    **options: Any,
) -> Prunable:
    """A copy of the network in float32, trained on the job's noise schedule; it lies on the CPU afterwards."""
    with on_device(unet, "cpu"):
        copied = copy.deepcopy(unet).float().requires_grad_()
    options = {"schedule": job.schedule, **options}
    trained = train_stage(copied, stage, objective, config, job.teacher, pairs, offloadable, **options)
    return trained.requires_grad_(False).to("cpu")


def converted_to_v(job: Distillation, train: Callable[..., Prunable]) -> UNets:
    """The teacher and the student; networks that predict ε are converted to v-prediction: x̂ from ε is lost in noise."""
    unets = {"teacher": job.teacher.unet, "student": job.student}
    if job.predicts_v:
        return unets
    conversion = job.teacher.config.v_prediction
    converted: dict[int, Prunable] = {}  # the student may be the teacher
    for name, unet in unets.items():
        if id(unet) not in converted:
            converted[id(unet)] = train(unet, conversion.objective, conversion.train, f"velocity-{name}")
    return {name: converted[id(unet)] for name, unet in unets.items()}


def distilled(
    job: Distillation,
    stage: DistillationStage,
    unets: UNets,
    pairs: Callable[[], CachedPairs],
    train: Callable[..., Prunable],
    monitor: ImageMonitor,
) -> Prunable:
    """The network that one stage trains; where it exists it is loaded."""
    unet, training, teacher = unets[stage.start], job.training(stage.name), job.teacher
    if job.distillation.guidance_embed_dim:
        unet = with_guidance_embedding(unet, job.distillation.guidance_embed_dim)
    if job.distillation.quantize:
        unet = in_low_precision(unet, job.distillation.quantize)
    log.info(f"{stage.name}: starts from {stage.start}, its teacher {stage.teacher} with {stage.teacher_steps} steps")

    def teaching() -> Prunable:
        if not training.compile:
            return compute_copy(unets[stage.teacher], teacher)
        compiled = copy.deepcopy(unets[stage.teacher]).to(teacher.device, teacher.compute_dtype)
        compiled.compile(dynamic=False)
        return compiled

    def samples(objective: Objective):
        """The pairs; with cached teacher targets, where the objective requires them."""
        if (cached := requirements(objective).cached_targets) is None:
            return pairs()
        run, batch_size = teacher.run, teacher.config.eval.batch_size
        draws = TargetInputs(pairs(), cached, pairs().unconditional, run.seed)
        keep = run.path / PARTIAL / f"{stage.name}-answers"
        return with_targets(draws, cached.compute, run, stage.name, batch_size, keep)

    more: dict[str, Any] = {"step_schedule": job.step_schedule(stage), "monitor": monitor}
    if job.requires.initial_student:
        more["initial_student"] = partial(compute_copy, unets["student"], teacher)
    return train(unet, job.objective(stage), training, stage.name, teaching=teaching, samples=samples, **more)


def stage_monitor(
    job: Distillation, prompts: PromptSet, scorer: ClipScorer | None, stage: DistillationStage
) -> ImageMonitor:
    """What looks at the student of a stage, sampled as its export is, where `train.evaluate_every` asks for it."""
    config, teacher = job.teacher.config.eval, job.teacher
    scale = job.sampled_guidance(stage.name, job.compared_guidance(stage.name))
    scheduler = job.student_scheduler(stage.steps)
    sampler = Sampler(teacher.pipeline, stage.steps, scale, config.seed, scheduler, teacher.precision)
    return ImageMonitor(sampler, prompts, scorer, teacher.run, stage.name, config.batch_size, config.pictures)


# ---- evaluation ----


def calibration_prompts(job: Distillation, prompts: PromptSet) -> list[str] | None:
    """The eval prompts that are calibration prompts of the student, as the run that pruned it says; logged.

    None where the student is no export of prune_unet's.
    """
    file = Path(job.distillation.student or "").parent / "prompts.json"
    if not job.distillation.student or not file.is_file():
        return None
    both = among(prompts, read_calibration_prompts(file))
    if both:
        count = f"{len(both)} of {len(prompts.distinct)} prompts of the evaluation"
        log.warning(f"{count} are calibration prompts of the student: {few(both)}")
    return both


def evaluated(
    job: Distillation, unets: UNets, prompts: PromptSet, scorer: Any, calibration: list[str] | None
) -> Evaluation:
    """The teacher (DDIM, and DPM++ 2M, what a user would pick; of a flow Euler, and Euler with its σ stretched as for
    students) and every student at many settings, from the same noise per prompt.

    Distances are to the latents of the teacher's first number of steps at the same guidance scale.
    """
    config, teacher, run = job.teacher.config, job.teacher, job.teacher.run
    models = sampled_models(job, unets)
    encoded = cache(lambda: teacher.sampler(config.eval).encode(prompts.prompts))  # the same at every setting

    def candidate(name: str, steps: int, guidance: float) -> Candidate:
        unet, scheduler = models[name], job.sampler(name, steps)
        scale = job.sampled_guidance(name, guidance)
        sampler = Sampler(teacher.pipeline, steps, scale, config.eval.seed, scheduler, teacher.precision)

        def draw(sampler: Sampler, indices: list[int]) -> Tensor:
            return sampler.latents_at(unet, encoded().rows(indices), indices).float()

        facts = {"evaluations": sampler.evaluations(unet)}
        return Candidate(partial(draw, sampler), sampler.protocol, facts, sampler.decode,
                         reseeded=lambda seed: partial(draw, sampler.reseeded(seed)),
                         loaded=partial(on_device, unet, teacher.device))  # fmt: skip

    features = {"features": FeatureSimilarity(scorer)} if scorer else {}
    near = {"psnr": Psnr(), **features, "latent_error": SampleError()}
    of_prompts = teacher.is_conditional, teacher.has_captions
    metrics = {**load_metrics(config, scorer, teacher.device, *of_prompts), **near}
    metrics = of_what_is_drawn({**metrics, **real_distance(config, scorer)}, teacher.draws_videos, scorer)
    reference = "teacher", job.distillation.steps[0]
    evaluator = Evaluator(config, run, candidate, prompts, metrics, scorer, reference)
    points = [evaluator.point(*key) for key in settings(job)]
    forget_times_of_others(run, evaluator.finished, points)
    protocol = {**(scorer.protocol if scorer else {}), "seed": config.eval.seed}
    seen = seen_prompts(run) | ({} if calibration is None else {"prompts_in_calibration": len(calibration)})
    return evaluator.evaluate(points, {name: name for name in models}, protocol, seen)


def sampled_models(job: Distillation, unets: UNets) -> dict[str, Prunable]:
    """{name: network}, in the order in which they are evaluated."""
    converted = {"teacher-v": unets["teacher"], "student": unets["student"]}
    students = {stage.name: unets[stage.name] for stage in job.stages}
    return {name: {**converted, **students}.get(name, job.teacher.unet) for name in job.evaluated}


def settings(job: Distillation) -> list[tuple[str, int, float]]:
    """Model, steps and guidance scale of every point; most steps first, the teacher at the reference's, too."""
    return [(name, steps, guidance) for guidance in job.teacher.config.curves.guidance for name in job.evaluated
            if guidance in job.evaluated_guidance(name) for steps in job.evaluated_steps(name)]  # fmt: skip


def forget_times_of_others(run: Run, finished: Evaluation | None, points: list[Point]) -> None:
    """Where other points are requested than were evaluated before, the times are measured again."""
    grown = finished and [p.key for p in finished.points] != [p.key for p in points]
    if grown and run.accelerator.is_main_process:
        (run.path / "unet_ms.json").unlink(missing_ok=True)
    run.accelerator.wait_for_everyone()


def measure_unets(job: Distillation, unets: UNets) -> None:
    """unet_ms.json: {rows: {network: ms}} of evaluations of one row and of two, interleaved; rank 0 alone."""
    teacher, run = job.teacher, job.teacher.run

    def make() -> dict:
        timed = {name: unet for name, unet in sampled_models(job, unets).items() if name not in OTHER_SAMPLERS}
        ms = {rows: compare_ms(timed, replace(teacher.latency, batch=rows), teacher.device) for rows in (1, 2)}
        return {"ms": ms, "protocol": asdict(teacher.latency), "environment": environment()}

    run.json("unet_ms.json", lambda: run.of_rank_0(make))


def write_page(run: Run) -> None:
    """The page, and the curves as a table for a tracker if there is one."""
    write_steps_report(run.path, lambda: track_table(run, "curves", points_table(timed_points(run.path))))
