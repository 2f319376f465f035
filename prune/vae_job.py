"""The decoder job (SnapFusion, section 3.2): channels of the VAE decoder go, and the rest learns its images again.

A model that makes videos of their first frames has those in the place of prompts; its latents are of whole videos, and
are decoded in chunks of frames, as its pipeline does.

Axes: P latents, C channels, F frames, H and W height and width. What is written P3HW of images is PFHW3 of videos.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import torch
from diffusers import ModelMixin
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset

from slimstep.data.prompts import PromptSet
from slimstep.engine import components
from slimstep.engine.environment import environment
from slimstep.engine.files import damaged
from slimstep.engine.loop import load_trained, train, trained
from slimstep.engine.objective import check_requirements
from slimstep.engine.parallel import map_batches
from slimstep.engine.planning import Plan
from slimstep.engine.resolution import printed, resolution_of
from slimstep.engine.run import Run
from slimstep.eval.decoders import compare_decoders
from slimstep.eval.evaluator import Candidate, Evaluator, write_pictures
from slimstep.eval.exporting import clip_line, export, write_results
from slimstep.eval.inputs import (
    Teacher,
    check_data,
    check_inputs,
    check_weights,
    heldout_pairs,
    load_metrics,
    load_prompts,
    load_scorer,
    load_teacher,
    note_trained_on,
    offloadable,
    seen_prompts,
    training_data,
)
from slimstep.eval.metrics.compare import mean_and_error
from slimstep.eval.metrics.metric import FeatureSimilarity, Metric, Psnr, Ssim
from slimstep.eval.metrics.video import OfFrames, TemporalError, on_videos, video_metrics
from slimstep.eval.pages.vae_page import quality_table, vae_table, write_vae_report
from slimstep.eval.plan import BYTES, CHECKPOINT_COPIES, Stage, image_rows, planned, scorer_stage
from slimstep.eval.plan import export as export_stage
from slimstep.eval.record import Evaluation, Point, Values
from slimstep.eval.reporting import report, track_table
from slimstep.eval.sampling import Sampler
from slimstep.eval.scorer_check import check_scorer
from slimstep.eval.training import make_objective, offloaded
from slimstep.models.cost import count_parameters
from slimstep.models.decoding import decoder_of, has_statistics, is_causal
from slimstep.models.pipeline import with_unet
from slimstep.models.sizes import check_frames, native_frames, sides_of
from slimstep.models.vae import NarrowDecoder
from slimstep.prune.config import BY_ACTIVATIONS, Config
from slimstep.prune.decoder import PRUNABLE, choose_channels, pruned_vae, pruned_widths, stock_widths
from slimstep.prune.vae_latents import (
    HELDOUT,
    TRAINING,
    DecoderPruning,
    heldout,
    latent_mix,
    parts,
    training_prompts,
)

log = logging.getLogger("slimstep")


def prune_vae(config: Config, run: Run) -> int | Plan:
    """Runs or continues the job, or says what it would do; returns exit code 0."""
    teacher = load_teacher(config, run)
    check_weights(teacher.pipeline, config)  # a plan's, too: its rate is the decoder's
    teacher.pipeline.vae.float()  # it is pruned and distilled from in float32
    job = decoder_pruning(teacher)
    check(job)
    (_, prompts), scorer = load_prompts(teacher), load_scorer(config, run.accelerator.device)
    if config.plan:
        return planned(teacher, [*(scorer_stage(run) if teacher.is_conditional else []), *decoder_stages(job)], [])
    if teacher.is_conditional:
        check_scorer(teacher.config, run, scorer)
    data = cache(partial(training_data, teacher))
    pruned = pruned_decoder(job, data)
    vaes = {"teacher": teacher.pipeline.vae, "pruned": pruned}
    evaluator = evaluator_of(job, vaes, prompts, scorer)
    setting = config.eval.steps, config.eval.guidance_scale
    points = [evaluator.point(name, *setting) for name in vaes]
    student = vaes["student"] = distilled(job, pruned, prompts, data, offloadable(teacher.pipeline, scorer))
    points.append(evaluator.point("student", *setting))
    export(with_unet(teacher.pipeline, teacher.unet, vae=student), "export", teacher)
    times = measure(job, student)
    held = heldout(job, prompts)
    run.folder("images/real", partial(write_pictures, held["images"][: config.eval.pictures]))
    widths = {"teacher": list(stock_widths(job.vae)), "student": list(job.widths)}
    protocol = {**(scorer.protocol if scorer else {}), **teacher.sampler(config.eval).protocol}
    evaluation = evaluator.evaluate(points, dict(zip(vaes, vaes, strict=True)), protocol, seen_prompts(run),
                                    n_real=len(held["real"]), widths=widths)  # fmt: skip
    write_results(run, "export", results(evaluation, times))
    track = partial(track_table, run, "decoders", quality_table(evaluation))
    report(run, partial(write_vae_report, run.path, track), partial(vae_table, run.path))
    return 0


def decoder_pruning(teacher: Teacher) -> DecoderPruning:
    """Raises ValueError for a decoder that cannot be pruned, or not so, and for data that cannot be had."""
    config, vae = teacher.config, teacher.pipeline.vae
    decoder, latents = OmegaConf.to_object(config.decoder), OmegaConf.to_object(config.latents)
    if type(vae) not in PRUNABLE:
        kind, known = type(vae).__name__, " or ".join(kind.__name__ for kind in PRUNABLE)
        way = "the denoiser is pruned without it, by +experiment=prune_unet, prune_transformer or prune_svd"
        raise ValueError(f"the model's VAE is {kind}; a decoder is pruned from diffusers' own {known}: {way}")
    widths = pruned_widths(vae, decoder.width, decoder.norm_groups)
    check_frames_learnt(teacher, decoder.frames)
    check_data(teacher)
    data = heldout_pairs(config, config.eval.prompts), training_prompts(teacher)
    return DecoderPruning(teacher, teacher.run, vae, decoder, latents, widths, *data)


def check_frames_learnt(teacher: Teacher, frames: int | None) -> None:
    """ValueError for a number of frames that a decoder does not learn from by itself, or the model does not make."""
    pipeline, name = teacher.pipeline, f"decoder.frames={frames}"
    if frames is None:
        return
    if not is_causal(pipeline.vae):
        way = "model.video.decode_chunk_size says how many it has" if teacher.draws_videos else "set it to null"
        kind = type(pipeline.vae).__name__
        raise ValueError(f"{name} is of CogVideoX's and Wan's decoders, and this is a {kind}: {way}")
    check_frames(pipeline, frames)
    most = native_frames(pipeline) or 1
    if not 1 < frames <= most:
        raise ValueError(f"{name} must be more than 1, an image, and at most the {most} that the model makes")


def check(job: DecoderPruning) -> None:
    """ValueError, before anything is made, for latents, data or an objective that will not do."""
    config = job.teacher.config
    components.check(config.objective, "objective")
    if config.train.channels_last and job.latents_at_once:
        why = f"torch has none for the 3-D convolutions of {type(job.vae).__name__}"
        raise ValueError(f"train.channels_last=true: {why}; set it to false")
    if job.latents_at_once == 2 and job.teacher.device.type == "cpu" and job.teacher.compute_dtype == torch.bfloat16:
        why = "torch's gradient of convolutions over two frames is garbage in bfloat16 on a CPU"
        raise ValueError(f"mixed_precision=bf16: {why}; decode another number of frames at once, or set no")
    check_requirements(objective_of(job), config.train, job.run.accelerator)
    if job.teacher.latency.iterations < 2:
        raise ValueError("latency.iterations=1: a ratio needs quartiles, of 2 timings and more")
    check_inputs(job.teacher)
    job.teacher.sampler(job.latents)
    if (count := len(job.heldout_pairs)) < 2:
        reason = f"the data hold {count} held-out images; a decoder is evaluated on 2 and more"
        raise ValueError(f"{reason}: a higher data.heldout_fraction")


# ---- the pruned decoder ----


def pruned_decoder(job: DecoderPruning, data: Callable[[], Dataset]) -> NarrowDecoder:
    """The chosen channels of the teacher's decoder, untrained; the choice is in channels.json."""
    decoder, run, vae, statistics = job.decoder, job.run, job.vae, has_statistics(job.teacher.pipeline)

    def choose() -> dict | None:
        mix = latent_mix(job, 0, data) if decoder.importance in BY_ACTIVATIONS else None  # by all ranks together
        if not run.accelerator.is_main_process:
            return None
        # Channels are chosen by the first latents that training sees.
        latents = mix and torch.stack([mix[i]["latents"] for i in range(min(decoder.samples, len(mix)))])
        if mix and job.latents_at_once:
            latents = latents[:, :, : job.latents_at_once]
        return choose_channels(vae, job.widths, decoder.importance, latents, run.seed, decoder.norm_groups, statistics)

    channels = run.json("channels.json", choose)
    log.info(f"decoder: {stock_widths(vae)} → {job.widths} channels, by {decoder.importance}")
    with damaged(run.path / "channels.json"):
        return pruned_vae(vae, channels, job.widths, decoder.norm_groups)


def distilled(
    job: DecoderPruning, pruned: NarrowDecoder, prompts: PromptSet, data: Callable[[], Dataset],
    offloadable: Sequence[nn.Module],
) -> NarrowDecoder:  # fmt: skip
    """Trained round by round, each a training of its own on more latents; a finished round is loaded."""
    run, config = job.run, job.teacher.config
    vae = copy.deepcopy(pruned).requires_grad_(False)
    student = decoder_of(vae, has_statistics(job.teacher.pipeline))
    student.decoder.requires_grad_(True)
    for r in range(job.latents.rounds):
        stage = f"round-{r:02d}"
        if trained(run, stage):
            load_trained(student, run, stage)
            continue
        objective, mix = objective_of(job), latent_mix(job, r, data)
        note_trained_on(run, prompts, [prompt.removeprefix(TRAINING) for prompt in job.prompts or ()])
        with offloaded(offloadable):  # the decoder that teaches is a copy
            train(student, objective, mix, config.train, run, stage)
    return vae.requires_grad_(False).eval()


def objective_of(job: DecoderPruning) -> Any:
    """The loss, with the teacher's decoder as training runs it. ValueError where its arguments will not do."""
    # Autoencoders are known to overflow in float16: there the teacher's stays in float32.
    teacher, config = job.teacher, job.teacher.config
    dtype = torch.bfloat16 if teacher.compute_dtype == torch.bfloat16 else torch.float32
    decoder = decoder_of(copy.deepcopy(job.vae), has_statistics(teacher.pipeline)).to(teacher.device, dtype)
    if config.train.channels_last:
        decoder.to(memory_format=torch.channels_last)
    if config.train.compile:
        decoder.compile(dynamic=False)
    own = {"latents_at_once": job.latents_at_once} if job.latents_at_once else {}
    return make_objective(config.objective, teacher=decoder, **own)


# ---- what it is worth ----


def evaluator_of(job: DecoderPruning, vaes: dict[str, ModelMixin], prompts: PromptSet, scorer: Any) -> Evaluator:
    """Every decoder on the same latents: sampled ones by the evaluator, real ones beside it. `vaes` grows while the
    job goes on."""
    teacher, config = job.teacher, job.teacher.config.eval
    held = cache(lambda: heldout(job, prompts))
    near = nearness(teacher, scorer)

    def candidate(name: str, *_: Any) -> Candidate:
        sampler, latents = sampler_with(job, vaes[name]), held()  # here, by all ranks: a batch is of one alone
        facts = {"parameters": {"decoder": count_parameters(vaes[name].decoder)}}
        return Candidate(lambda indices: sampler.decode(latents["sampled"][indices]), sampler.protocol, facts,
                         more=lambda: nearness_on_real(job, name, sampler, latents, near))  # fmt: skip

    metrics = {**of_images(teacher, scorer), **near}
    return Evaluator(teacher.config, teacher.run, candidate, prompts, metrics, scorer, ("teacher", config.steps))


def of_images(teacher: Teacher, scorer: Any) -> dict[str, Metric]:
    """The metrics of what a decoder gives by itself. Of videos there are none to real ones: all decoders have the same
    latents."""
    own = teacher.is_conditional, teacher.has_captions
    metrics = load_metrics(teacher.config, scorer, teacher.device, *own)
    if not teacher.draws_videos:
        return metrics
    metrics = {name: metric for name, metric in metrics.items() if name not in ("image_error", "fd")}
    return on_videos(metrics) | video_metrics(scorer, metrics.get("clip"))


def nearness(teacher: Teacher, scorer: Any) -> dict[str, Metric]:
    """How near a decoder's image, or video, is to another of the same latents."""
    near = {"psnr": Psnr(), "ssim": Ssim(), **({"features": FeatureSimilarity(scorer)} if scorer else {})}
    if not teacher.draws_videos:
        return near
    return {**on_videos(near), "psnr_worst_frame": OfFrames(Psnr(), "worst"), "temporal_error": TemporalError()}


def sampler_with(job: DecoderPruning, vae: nn.Module) -> Sampler:
    """The pipeline's sampler around another VAE."""
    teacher = job.teacher
    return teacher.sampler(teacher.config.eval, with_unet(teacher.pipeline, teacher.unet, vae=vae))


def nearness_on_real(
    job: DecoderPruning, name: str, sampler: Sampler, held: Mapping[str, Tensor], metrics: Mapping[str, Metric]
) -> dict[str, Values]:
    """A decoder's images of real latents beside the teacher decoder's (`real_…`) and beside the images (`image_…`)."""
    run, config, latents, images = job.run, job.teacher.config.eval, held["real"], held["images"]
    reference = sampler_with(job, job.vae)
    run.folder(f"images/{name}/real", lambda path: write_pictures(sampler.decode(latents[: config.pictures]), path))

    def rate(indices: list[int]) -> Tensor:
        decoded, theirs = sampler.decode(latents[indices]), reference.decode(latents[indices])
        references = theirs, images[indices].to(decoded.device)
        columns = [metric(decoded, (), reference) for reference in references for metric in metrics.values()]
        return torch.stack([column.float().cpu() for column in columns], 1)

    values = map_batches(rate, len(latents), config.batch_size, run.accelerator, f"{name}: images of real latents").T
    names = [f"{prefix}{key}" for prefix in ("real_", "image_") for key in metrics]
    summaries = {key: {"kind": "paired", **asdict(mean_and_error(v.tolist())), "per_prompt": v.tolist()}
             for key, v in zip(names, values, strict=True)}  # fmt: skip
    is_reference = name == "teacher"
    return {key: None if is_reference and key.startswith("real_") else value for key, value in summaries.items()}


def measure(job: DecoderPruning, student: NarrowDecoder) -> dict:
    """vae_ms.json: both decoders' milliseconds and the ratio, interleaved; rank 0 alone."""
    native, run, teacher, latent_frames = sides_of(job.teacher.unet.config), job.run, job.teacher, job.latents_at_once
    twice = [] if latent_frames else [resolution_of(*(2 * side for side in native))]
    sizes = job.decoder.latent_sizes or [resolution_of(*native), *twice]

    def make() -> dict:
        config = replace(teacher.latency, batch=1)
        vaes = {"teacher": job.vae, "student": student}
        rows = compare_decoders(vaes, sizes, job.decoder.batches, config, teacher.device, latent_frames)
        return {"rows": rows, "protocol": asdict(config), "environment": environment()}

    return run.json("vae_ms.json", lambda: run.of_rank_0(make))


def results(evaluation: Evaluation, times: Values) -> Sequence[str]:
    """The pruned decoder's scores and times, for the model card."""
    row = times["rows"][0]
    faster = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}] times as fast as the teacher's"
    where = f"on {times['environment']['device']}, {row['mode']}, {times['protocol']['dtype']}"
    count = f"{row['latent_frames']} " if "latent_frames" in row else ""
    place = f"{count}latents of {printed(row['latent_size'])}, batch {row['batch']}"
    return [quality_line(evaluation.points[-1]), f"VAE decoder: {faster} ({place}, {where})"]


def quality_line(student: Point) -> str:
    """The decoder's CLIP score, or, where there are no captions, how near the frames of its videos are."""
    if "clip" in student.metrics:
        return clip_line(student.clip)
    mean, worst = (f"{student.mean(name):.2f}" for name in ("psnr", "psnr_worst_frame"))
    return f"PSNR of frames to the teacher decoder's: {mean} dB, of the worst frame of each video {worst} dB"


# ---- the plan ----


def decoder_stages(job: DecoderPruning) -> Iterator[Stage]:
    """The artifacts in the order in which they are made; decoders are not counted among UNet forwards,
    latents as if none were in the cache."""
    latents, teacher = job.latents, job.teacher
    evaluated, config = teacher.config.eval, teacher.config.train
    size = BYTES * count_parameters(job.vae.decoder)
    kept = CHECKPOINT_COPIES * size * min(config.keep_checkpoints, (config.steps - 1) // config.checkpoint_every)
    samples = config.steps * config.batch_size * config.accumulation * job.run.accelerator.num_processes
    yield Stage("channels.json", f"{job.widths} channels, by {job.decoder.importance}")
    held = evaluated.prompts * image_rows(evaluated.steps, evaluated.guidance_scale)
    yield Stage(HELDOUT, f"{evaluated.prompts} held-out latents of {evaluated.steps} steps", held)
    before = 0
    for r in range(latents.rounds):
        sampled, real = parts(latents, r)
        rows = (sampled - before) * image_rows(latents.steps, latents.guidance_scale)
        work = f"{config.steps} steps, {samples} samples of {sampled} sampled latents and {real} images"
        yield Stage(f"round-{r:02d}/weights.safetensors", work, rows, size + kept, decoded=samples)
        before = sampled
    yield export_stage("export", teacher)
    yield Stage("vae_ms.json", "both decoders, interleaved")
    yield Stage("report.html", "")
