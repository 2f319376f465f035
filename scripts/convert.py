"""One file in Stable Diffusion's original layout, as web UIs read it, from a diffusers folder; and the other way round.

    python scripts/convert.py runs/distill_steps/steps-8/export student.safetensors --dtype float16
    python scripts/convert.py model.safetensors DIR          # also .ckpt, with --allow-pickle

SD-1.x, SD-2.x and SDXL; a hub id serves as a folder. What is there is replaced with --force only.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusers import DiffusionPipeline

from engine.launch import fail, set_up
from models.checkpoint import SAFE, is_single_file
from models.original_layout import check_layout, write_original
from models.pipeline import DType, check_pipeline, export_pipeline, networks, one_line, read_pipeline

log = logging.getLogger("slimstep")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a single file, a diffusers folder or a hub id")
    parser.add_argument("target", type=Path, help="a .safetensors file for a folder, a folder for a file")
    parser.add_argument("--dtype", choices=get_args(DType), help="default: that of the source's UNet")
    parser.add_argument("--variant", help="infix of the folder's weight files, as fp16: those read, or those written")
    parser.add_argument("--config", help="for a file: what model.single_file_config is for a model")
    parser.add_argument("--vae", help="another autoencoder: what model.vae is for a model")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin, .ckpt and .pt files too")
    parser.add_argument("--force", action="store_true", help="replace a target that exists")
    options = parser.parse_args()
    set_up()
    try:
        convert(**vars(options))
    except (ValueError, OSError) as error:
        fail(one_line(error))


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


if __name__ == "__main__":
    main()
