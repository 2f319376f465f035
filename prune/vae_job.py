"""The decoder job (SnapFusion, section 3.2): channels of the VAE decoder go, and the rest learns its images again."""

from collections.abc import Iterator

from slimstep.engine.planning import Plan
from slimstep.engine.run import Run
from slimstep.eval.plan import BYTES, CHECKPOINT_COPIES, Stage, export, image_rows, planned, scorer_stage
from slimstep.eval.scorer_check import check_scorer
from slimstep.models.cost import count_parameters
from slimstep.prune.config import Config
from slimstep.prune.vae_bench import HELDOUT, VaeBench


def prune_vae(config: Config, run: Run) -> int | Plan:
    """Runs or continues the job, or tells what it would do; returns exit code 0."""
    bench = VaeBench(config, run)
    bench.check()
    if config.plan:
        return planned(bench, [*scorer_stage(bench), *decoder_stages(bench)], [])
    check_scorer(bench)
    sliced = bench.sliced()
    judged = [bench.judge("wide", bench.wide), bench.judge("sliced", sliced)]
    narrow = bench.distil(sliced)
    judged.append(bench.judge("narrow", narrow))
    bench.export(narrow)
    times = bench.measure(narrow)
    bench.write_card(bench.evaluate(judged), times)
    bench.report()
    return 0


def decoder_stages(bench: VaeBench) -> Iterator[Stage]:
    """The products in the order in which they are made; decoders are not counted among UNet forwards,
    latents as if none were in the cache."""
    latents, judged, config = bench.latents, bench.config.eval, bench.config.train
    size = BYTES * count_parameters(bench.wide.decoder)
    kept = CHECKPOINT_COPIES * size * min(config.keep_checkpoints, (config.steps - 1) // config.checkpoint_every)
    samples = config.steps * config.batch_size * config.accumulation * bench.run.accelerator.num_processes
    yield Stage("channels.json", f"{bench.widths} channels, by {bench.decoder.choice}")
    held = judged.prompts * image_rows(judged.steps, judged.guidance_scale)
    yield Stage(HELDOUT, f"{judged.prompts} held-out latents of {judged.steps} steps", held)
    before = 0
    for r in range(latents.rounds):
        sampled, real = bench.parts(r)
        rows = (sampled - before) * image_rows(latents.steps, latents.guidance_scale)
        work = f"{config.steps} steps, {samples} samples of {sampled} sampled latents and {real} images"
        yield Stage(f"round-{r:02d}/weights.safetensors", work, rows, size + kept, decoded=samples)
        before = sampled
    yield export("export", bench)
    yield Stage("vae_ms.json", "both decoders, interleaved")
    yield Stage("report.html", "")
