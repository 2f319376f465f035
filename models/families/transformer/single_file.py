"""A transformer from one file of weights, as ComfyUI and others keep them, through diffusers' converters.

Such a file holds no configuration, and seldom an autoencoder or text encoders: those are a diffusers model's.
"""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

from slimstep.engine.quiet import preview
from slimstep.models.checkpoint import SAFE, read_weights
from slimstep.models.families.transformer.network import PrunableTransformer
from slimstep.models.folder import stored_keys

log = logging.getLogger("slimstep")
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
OTHERS = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.")


def bare(key: str) -> str:
    """A weight's name without what files of several networks put before it."""
    return next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)


def names_in(file: str | Path) -> set[str]:
    """The bare names in a .safetensors file; none where it cannot be read, or is of another kind."""
    if Path(file).suffix != SAFE or not Path(file).is_file():
        return set()
    try:
        return set(map(bare, stored_keys(Path(file))))
    except ValueError:
        return set()


def holds(names: Collection[str], kinds: Collection[Collection[str]]) -> bool:
    """Whether all names of one of these kinds are among those of a file."""
    return any(set(kind) <= set(names) for kind in kinds)


def transformer_in(
    file: str | Path, kind: type[PrunableTransformer], folder: str | Path, part: str, dtype: torch.dtype | None
) -> PrunableTransformer:
    """The network in the file, with the configuration of `part` in a diffusers folder or hub id.

    dtype: None is the file's. Raises ValueError where the weights are not those that the configuration asks for.
    """
    stored = read_weights(file)
    if left := sorted(key for key in stored if key.startswith(OTHERS)):
        log.warning(f"{file} holds more than a transformer, {preview(left)}: those parts are taken of {folder}")
    weights = {bare(key): value for key, value in stored.items() if not key.startswith(OTHERS)}
    with init_empty_weights():
        network = kind.from_config(kind.load_config(folder, subfolder=part))
    expected = network.state_dict()
    if not expected.keys() <= weights.keys():
        try:
            weights = SINGLE_FILE_LOADABLE_CLASSES[kind.STOCK.__name__]["checkpoint_mapping_fn"](checkpoint=weights)
        except (KeyError, IndexError) as error:
            raise ValueError(f"{file} lacks weights of a {kind.STOCK.__name__}: {error}") from error
    check_fit(weights, expected, f"{file} does not belong to {folder}/{part}/config.json")
    dtype = dtype or next(iter(weights.values())).dtype
    return kind.from_single_file(weights, config=str(folder), subfolder=part, dtype=dtype)


def check_fit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], problem: str) -> None:
    """ValueError unless both have the same names and shapes."""
    if lacking := sorted(expected.keys() - weights.keys()):
        raise ValueError(f"{problem}: it lacks {len(lacking)} of its weights, {preview(lacking)}")
    if more := sorted(weights.keys() - expected.keys()):
        raise ValueError(f"{problem}: it holds {len(more)} more weights, {preview(more)}")
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            raise ValueError(f"{problem}: {name} is {tuple(value.shape)}, not {tuple(expected[name].shape)}")
