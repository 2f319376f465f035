"""Networks out of the weights of a single file in Stable Diffusion's original layout, through diffusers' converters."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from torch import Tensor
from transformers import PreTrainedModel

from slimstep.engine.quiet import preview
from slimstep.models.networks import without_memory
from slimstep.models.original_layout import (
    OPEN_TEXT,
    TEXT,
    TEXTS_XL,
    VAE,
    clip_weights,
    is_open_clip,
    open_clip_weights,
    unet_weights,
    vae_weights,
)


class LackingError(ValueError):
    """Weights of a part that are not in a file."""

    def __init__(self, part: str, names: Iterable[str]) -> None:
        super().__init__(f"of the {part} {preview(names)}")


def converted(
    weights: dict[str, Tensor], kind: type[ModelMixin], part: str, config: str, dtype: torch.dtype,
    subfolder: str | None = None,
) -> ModelMixin:
    """A UNet or VAE by diffusers' converter; config: the folder whose subfolder has its configuration.

    Raises LackingError where weights are absent.
    """  # fmt: skip
    try:
        return kind.from_single_file(weights, config=config, dtype=dtype, subfolder=subfolder)
    except (NotImplementedError, KeyError, TypeError) as error:  # torch's and the converter's, for what is absent
        with torch.device("meta"):
            network = kind.from_config(kind.load_config(config, subfolder=subfolder))
        names = [name for name, _ in (unet_weights if part == "unet" else vae_weights)(network)]
        if missing := [name for name in names if not {name, name.removeprefix(f"{VAE}.")} & weights.keys()]:
            raise LackingError(part, missing) from error
        raise


def text_encoder(
    weights: dict[str, Tensor], kind: type[PreTrainedModel], part: str, folder: Path, dtype: torch.dtype
) -> PreTrainedModel:
    """A text encoder by diffusers' converter, which takes several names. LackingError where weights are absent."""
    try:
        network = create_diffusers_clip_model_from_ldm(kind, weights, part, str(folder), dtype)
    except (ValueError, KeyError) as error:
        with torch.device("meta"):
            network = kind(kind.config_class.from_pretrained(folder, subfolder=part))
        if missing := [name for name in original_text_names(network, part, weights) if name not in weights]:
            raise LackingError(part, missing) from error
        raise
    if missing := without_memory(network):
        names = original_text_names(network, part, weights)
        raise LackingError(part, [name for name in names if name not in weights] or missing)
    return network


def original_text_names(network: PreTrainedModel, part: str, weights: dict[str, Tensor]) -> list[str]:
    if any(key.startswith("conditioner.") for key in weights):
        first, second = TEXTS_XL
        named = open_clip_weights(network, second) if part == "text_encoder_2" else clip_weights(network, first)
    else:
        named = open_clip_weights(network, OPEN_TEXT) if is_open_clip(network) else clip_weights(network, TEXT)
    return [name for name, _ in named]
