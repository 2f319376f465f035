"""A pipeline from one file of weights in Stable Diffusion's original layout, through diffusers' converters.

Such a file holds neither configuration nor tokenizer. They are those of `single_file_config`; else those that the hub
cache holds for the kind of model that diffusers infers from the weights; else our own for that kind (models/known.py).
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from torch import Tensor

from slimstep.engine.quiet import one_line
from slimstep.models.autoencoder import load_vae
from slimstep.models.checkpoint import check_file, read_weights, stored_scheduling
from slimstep.models.conversion import LackingError, converted, text_encoder
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.folder import cached_configuration, check_folder, hub_configuration, without_checker
from slimstep.models.known import KNOWN, known_by, write_configuration
from slimstep.models.schedulers import built, fields_of, stated

log = logging.getLogger("slimstep")
PARTS = {"UNet": ("model.diffusion_model.",), "VAE": ("first_stage_model.", "vae."),
         "text encoder": ("cond_stage_model.", "conditioner.embedders.")}  # fmt: skip
ADVICE = {
    "UNet": "LoRAs belong into model.loras, a VAE into model.vae",
    "VAE": "model.vae=FOLDER_OR_FILE gives it one",
    "text encoder": "it is part of a model; find the whole one, or its diffusers folder",
}


def check_single_file(file: str | Path, config: str | None, allow_pickle: bool) -> None:
    """ValueError for a file that is not there, or may run code where that is not allowed, or a config that is none."""
    check_file(file, allow_pickle)
    if config and config not in KNOWN:
        try:
            check_folder(config)
        except ValueError as error:
            choices = f"a diffusers folder, a hub id in the cache, or one of {', '.join(KNOWN)}"
            raise ValueError(f"model.single_file_config={config} must be {choices} ({one_line(error)})") from error


def load_single_file(
    file: str | Path, config: str | None, dtype: torch.dtype | None, vae: str | None = None, allow_pickle: bool = False
) -> DiffusionPipeline:
    """The pipeline in the file, with a prunable UNet.

    config: a diffusers folder, a hub id or a name in models.known; None for that of the kind which the weights tell.
    dtype: None is that of the file's UNet. vae: another one (models/autoencoder.py). Raises ValueError for weights that
    are absent, or that do not belong to the configuration.
    """
    weights = read_weights(file)
    check_parts(weights, spared="VAE" if vae else None)
    dtype = dtype or next(value.dtype for key, value in weights.items() if key.startswith(PARTS["UNet"]))
    scheduling = {} if config else stored_scheduling(file, weights)
    with configuration(weights, config, scheduling) as folder:
        index = DiffusionPipeline.load_config(folder)
        own_vae = AutoencoderKL.load_config(folder, subfolder="vae")
        networks = {"vae": load_vae(vae, own_vae, dtype, allow_pickle)} if vae else {}
        try:
            for part, kind in {"unet": PrunableUNet2DConditionModel, "vae": AutoencoderKL}.items():
                if part not in networks:
                    networks[part] = converted(weights, kind, part, str(folder), dtype, subfolder=part)
            for part in ("text_encoder", "text_encoder_2"):
                if part in index:
                    networks[part] = text_encoder(weights, getattr(transformers, index[part][1]), part, folder, dtype)
        except LackingError as error:
            kind = f"the configuration in {config}" if config else f"a {index['_class_name']} of its kind"
            raise ValueError(f"it lacks weights that {kind} asks for: {error}") from error
        except ValueError as error:
            way = "model.single_file_config=FOLDER gives it another configuration"
            raise ValueError(f"{one_line(error).split(' If you want')[0]}; {way}") from error
        pipeline = DiffusionPipeline.from_pretrained(folder, **networks, **without_checker(index))
    if scheduling:
        pipeline.register_modules(scheduler=scheduler_with(pipeline.scheduler, scheduling))
    return pipeline


def scheduler_with(scheduler, scheduling: dict):
    """The scheduler with what the file says of it; DDIM where its own class cannot do that."""
    takes_all = set(scheduling) <= fields_of(type(scheduler))
    return built(type(scheduler) if takes_all else DDIMScheduler, {**stated(scheduler), **scheduling})


def check_parts(weights: dict[str, Tensor], spared: str | None) -> None:
    """ValueError where a whole network is absent, but for the `spared` one."""
    for part, prefixes in PARTS.items():
        if part != spared and not any(key.startswith(prefixes) for key in weights):
            raise ValueError(f"it holds no {part} (no weights are called {prefixes[0]}…): {ADVICE[part]}")


@contextmanager
def configuration(weights: dict[str, Tensor], config: str | None, scheduling: dict) -> Iterator[Path]:
    """A diffusers folder with the configuration of every part. ValueError for a kind that is not known."""
    if config and config not in KNOWN:
        yield Path(config) if Path(config).is_dir() else hub_configuration(config)
        return
    kind = config
    if config is None:
        hub_id = fetch_diffusers_config(weights)["pretrained_model_name_or_path"]
        if folder := cached_configuration(hub_id):
            check_folder(folder)
            yield folder
            return
        kind = own_kind(hub_id, scheduling)
    with tempfile.TemporaryDirectory() as folder:
        write_configuration(kind, Path(folder))
        yield Path(folder)


def own_kind(hub_id: str, scheduling: dict) -> str:
    """The name in models.known, which a line of the log tells. ValueError for a kind that is not known."""
    kind = known_by(hub_id)
    if kind is None:
        way = "model.single_file_config=FOLDER gives it a diffusers folder's configuration"
        raise ValueError(f"it is a model of the kind of {hub_id}, which is not in the hub cache: {way}")
    if kind == "sd21" and scheduling.get("prediction_type") == "epsilon":
        kind = "sd21_base"
    predicts = scheduling.get("prediction_type", KNOWN[kind].prediction_type)
    hint = "; its base models are model.single_file_config=sd21_base" if kind == "sd21" else ""
    log.info(f"single file: read as {kind}, {KNOWN[kind].pixels} px, predicting {predicts}, by its weights{hint}")
    return kind
