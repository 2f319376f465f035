"""A diffusers folder becomes one file in Stable Diffusion's original layout, and a file a folder."""

import logging
import time
from pathlib import Path

from diffusers import DiffusionPipeline

from models.checkpoint import SAFE, is_single_file
from models.original_layout import check_layout, write_original
from models.pipeline import check_pipeline, export_pipeline, networks, read_pipeline

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
    log.info(f"writing {size_gb(pipeline):.2f} GB of weights to {target}")
    if from_file:
        export_pipeline(pipeline, target, variant)
    else:
        write_original(pipeline, target)
    log.info(f"done in {time.perf_counter() - start:.0f} s")


def check_target(target: Path, from_file: bool, force: bool) -> None:
    """ValueError for a target of the wrong kind, or one that exists and may not be replaced."""
    if from_file and target.suffix == SAFE:
        raise ValueError(f"{target} is a file, and so is the source: name a folder")
    if not from_file and target.suffix != SAFE:
        raise ValueError(f"{target} must end in {SAFE}: the source is a folder, and becomes a file")
    if target.exists() and not force and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists: --force replaces it")


def size_gb(pipeline: DiffusionPipeline) -> float:
    """10⁹ bytes of weights."""
    return sum(p.numel() * p.element_size() for network in networks(pipeline) for p in network.parameters()) / 1e9
