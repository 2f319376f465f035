"""A pipeline from one file of weights in Stable Diffusion's original layout, through diffusers' from_single_file.

Such a file holds neither configuration nor tokenizer: those are of a diffusers folder or hub id of the same kind. Web
UIs have saved files in which the VAE's attention has diffusers' names amid the original ones: they are read, too.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SAFE, PICKLED = ".safetensors", ".ckpt"
VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "query": "q", "key": "k", "value": "v",
                 "proj_attn": "proj_out", "group_norm": "norm"}  # fmt: skip
MIXED = re.compile(rf"(first_stage_model\..*\.attn_1)\.({'|'.join(map(re.escape, VAE_ATTENTION))})\.(weight|bias)")


def is_single_file(name_or_path: str | Path) -> bool:
    return Path(name_or_path).suffix in (SAFE, PICKLED) and not Path(name_or_path).is_dir()


def check_single_file(file: str | Path, allow_pickle: bool) -> None:
    """ValueError for a file that is not there, or may run code where that is not allowed."""
    if not Path(file).is_file():
        raise ValueError(f"model {str(file)!r} does not exist")
    if Path(file).suffix == PICKLED and not allow_pickle:
        raise ValueError(f"model {str(file)!r} holds pickles, which may run code: model.allow_pickle=true reads it")


def usual_config(file: str | Path) -> str:
    """The hub id whose configuration diffusers takes for the kind of model that the file holds."""
    return fetch_diffusers_config(load_single_file_checkpoint(str(file)))["pretrained_model_name_or_path"]


def load_single_file(
    file: str | Path, config: str | Path, dtype: torch.dtype, local_files_only: bool
) -> DiffusionPipeline:
    """The stock pipeline of the class that `config`, a diffusers folder or hub id, names.

    Raises ValueError where `config` asks for weights that the file lacks.
    """
    of_config = {"local_files_only": local_files_only}
    lacking = ValueError(f"it lacks weights that the configuration in {config} asks for")
    pipeline_class = getattr(diffusers, DiffusionPipeline.load_config(config, **of_config)["_class_name"])
    try:
        with in_original_names(file) as readable:
            pipeline = pipeline_class.from_single_file(str(readable), config=str(config), dtype=dtype, **of_config)
    except NotImplementedError as error:  # torch's, for weights that stayed without memory
        raise lacking from error
    networks = (part for part in pipeline.components.values() if isinstance(part, nn.Module))
    if any(weight.is_meta for network in networks for weight in network.parameters()):  # text encoders raise nothing
        raise lacking
    return pipeline


@contextmanager
def in_original_names(file: str | Path) -> Iterator[Path]:
    """The file; while the block runs, a copy where names are mixed."""
    if Path(file).suffix == SAFE:
        with safe_open(file, "pt") as opened:
            mixed = any(map(MIXED.fullmatch, opened.keys()))
    else:
        mixed = any(map(MIXED.fullmatch, load_single_file_checkpoint(str(file))))
    if not mixed:
        yield Path(file)
        return
    weights = load_single_file_checkpoint(str(file))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / f"{Path(file).stem}{SAFE}"
        save_file({original_name(key): value.contiguous() for key, value in tensors(weights).items()}, copy)
        del weights
        yield copy


def original_name(key: str) -> str:
    """`first_stage_model.decoder.mid.attn_1.q.weight` for the same with `to_q` or `query`; others as they are."""
    found = MIXED.fullmatch(key)
    return f"{found[1]}.{VAE_ATTENTION[found[2]]}.{found[3]}" if found else key


def tensors(weights: Mapping) -> dict[str, Tensor]:
    """Without a checkpoint's counters and settings."""
    return {key: value for key, value in weights.items() if isinstance(value, Tensor)}
