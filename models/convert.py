"""A diffusers folder becomes one file in Stable Diffusion's original layout, and a file a folder."""

import logging
import time
from pathlib import Path

from diffusers import DiffusionPipeline

from slimstep.models.checkpoint import SAFE, is_single_file
from slimstep.models.decoding import STATISTICS, has_statistics
from slimstep.models.original_layout import check_layout, write_original
from slimstep.models.pipeline import check_pipeline, export_pipeline, networks, read_pipeline

log = logging.getLogger("slimstep")


def convert(
    source: str,
    target: Path,
    dtype: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    vae: str | None = None,
    allow_pickle: bool = False,
    force: bool = False,
) -> None:
    """Writes `target`, whole or not at all. Raises ValueError for what cannot be."""
    from_file = is_single_file(source)
    if config and not from_file:
        raise ValueError(f"--config={config} is for a single file, and {source} is a folder with its own configuration")
    check_target(target, from_file, force)
    start = time.perf_counter()
    log.info(f"reading {source}")
    options = {"allow_pickle": allow_pickle, **({"single_file_config": config} if from_file else {"variant": variant})}
    check_pipeline(source, **options)
    pipeline = read_pipeline(source, dtype, vae=vae, **options)
    if not from_file:
        check_layout(pipeline)
    size = sum(p.numel() * p.element_size() for network in networks(pipeline) for p in network.parameters())
    log.info(f"writing {size / 1e9:.2f} GB of weights to {target}")
    if from_file:
        export_pipeline(pipeline, target, variant)
    else:
        write_original(pipeline, target)
        if lost := left_out(pipeline):
            log.warning(f"the original layout holds weights alone; whoever reads {target} has to know {lost}")
    log.info(f"done in {time.perf_counter() - start:.0f} s")


def check_target(target: Path, from_file: bool, force: bool) -> None:
    """ValueError for a target of the wrong kind, or one that exists and may not be replaced."""
    if from_file and target.suffix == SAFE:
        raise ValueError(f"{target} is a file, and so is the source: name a folder")
    if not from_file and target.suffix != SAFE:
        raise ValueError(f"{target} must end in {SAFE}: the source is a folder, and becomes a file")
    if target.exists() and not force and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists: --force replaces it")


def left_out(pipeline: DiffusionPipeline) -> str:
    """What the folder's configuration says and readers of a single file would guess otherwise."""
    scheduler, vae = pipeline.scheduler.config, pipeline.vae.config
    usual_scale = 0.13025 if hasattr(pipeline, "text_encoder_2") else 0.18215
    guesses = [(scheduler, "prediction_type", "epsilon"), (scheduler, "rescale_betas_zero_snr", False),
               (vae, "scaling_factor", usual_scale)]  # fmt: skip
    matches = [f"{field}={config[field]}" for config, field, guess in guesses if config.get(field, guess) != guess]
    return ", ".join([*matches, *([f"the VAE's {' and '.join(STATISTICS)}"] if has_statistics(pipeline) else [])])
