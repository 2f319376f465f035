"""A pipeline from one file of weights in Stable Diffusion's original layout, through diffusers' from_single_file.

Such a file holds neither configuration nor tokenizer: those are of a diffusers folder or hub id of the same kind.
"""

from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from torch import nn

SAFE, PICKLED = ".safetensors", ".ckpt"


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
        pipeline = pipeline_class.from_single_file(str(file), config=str(config), dtype=dtype, **of_config)
    except NotImplementedError as error:  # torch's, for weights that stayed without memory
        raise lacking from error
    networks = (part for part in pipeline.components.values() if isinstance(part, nn.Module))
    if any(weight.is_meta for network in networks for weight in network.parameters()):  # text encoders raise nothing
        raise lacking
    return pipeline
