"""Another autoencoder for a pipeline, `model.vae`: for SDXL one whose activations stay within float16, say."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from slimstep.engine.quiet import one_line
from slimstep.models.checkpoint import check_file, is_single_file, read_weights
from slimstep.models.conversion import converted
from slimstep.models.decoding import STATISTICS
from slimstep.models.networks import load_network
from slimstep.models.vae import NarrowAutoencoderKL, NarrowDecoder

KINDS = {kind.__name__: kind for kind in (AutoencoderKL, NarrowAutoencoderKL)}
PREFIX, ORIGINAL = "first_stage_model.", "decoder.mid.block_1.conv1.weight"
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD = re.compile(rf"(.*\bmid_block\.attentions\.0)\.({'|'.join(OLD_ATTENTION)})\.(weight|bias)")


def load_vae(source: str, config: Mapping[str, Any], dtype: torch.dtype, allow_pickle: bool) -> AutoencoderKL:
    """The autoencoder of a folder, of a pipeline's folder, of a hub id or of a single file.

    config: that of the pipeline's own. A single file has the same; its names are the original ones, with or without
    `first_stage_model.`, or diffusers'. Raises ValueError where it cannot be read, or has other latents than the own.
    """
    if (kind := config.get("_class_name", AutoencoderKL.__name__)) not in KINDS:
        raise ValueError(f"model.vae={source} takes the place of an AutoencoderKL alone; the model has an {kind}")
    with torch.device("meta"):
        new = AutoencoderKL.from_config(dict(config))
    try:
        if is_single_file(source):
            check_file(source, allow_pickle)
            vae = vae_of_file(source, new, dtype)
        else:
            vae = vae_of_folder(source, dtype, allow_pickle)
    except (ValueError, OSError) as error:
        raise ValueError(f"model.vae={source} cannot be loaded: {one_line(error)}") from error
    own_meaning = latents_meaning(new)
    for field, value in latents_meaning(vae).items():
        if value != own_meaning[field]:
            message = f"{field} is {value}, the model's {own_meaning[field]}"
            raise ValueError(f"model.vae={source} belongs to another kind of model: its {message}")
    return vae


def latents_meaning(vae: nn.Module) -> dict[str, Any]:
    """What two autoencoders, of pictures or of videos, must agree in for the latents of one to be latents of the
    other."""
    names = ("latent_channels", "z_dim", "scaling_factor", "shift_factor", "in_channels", "out_channels")
    fields = {field: vae.config.get(field) for field in names}
    lists = {field: vae.config.get(field) for field in STATISTICS}
    lists = {field: values and list(values) for field, values in lists.items()}
    levels = vae.config.get("block_out_channels")
    factor = 2 ** (len(levels) - 1) if levels else vae.config.get("scale_factor_spatial")  # Wan's says it
    return {**fields, **lists, "shrinking factor": factor}


def vae_of_file(file: str, own: AutoencoderKL, dtype: torch.dtype) -> AutoencoderKL:
    """ValueError for a file without all the weights of an autoencoder."""
    weights = {own_name(key.removeprefix(PREFIX)): value for key, value in read_weights(file).items()}
    if ORIGINAL not in weights and (absent := own.state_dict().keys() - weights.keys()):
        raise ValueError(f"it is no autoencoder: it lacks {min(absent)} and {len(absent) - 1} more")
    with tempfile.TemporaryDirectory() as folder:
        own.save_config(folder)
        return converted(weights, AutoencoderKL, "vae", folder, dtype)


def own_name(key: str) -> str:
    """`decoder.mid_block.attentions.0.to_q.weight` for the same with `query`, its old name; others as they are."""
    match = OLD.fullmatch(key)
    return f"{match[1]}.{OLD_ATTENTION[match[2]]}.{match[3]}" if match else key


def vae_of_folder(source: str, dtype: torch.dtype, allow_pickle: bool) -> AutoencoderKL:
    where = "vae" if (Path(source) / "model_index.json").is_file() else None
    fields = AutoencoderKL.load_config(source, subfolder=where)
    if not isinstance(fields, dict):
        raise ValueError(f"{Path(where or '.') / 'config.json'} must hold a table, and holds {fields!r:.40}")
    if (class_name := fields.get("_class_name")) not in KINDS:
        raise ValueError(f"its class is {class_name}, not one of {list(KINDS)}")
    return load_network(source, where, KINDS[class_name], dtype, use_safetensors=None if allow_pickle else True)


def stock_vae(vae: nn.Module) -> nn.Module:
    """Diffusers' own class where the decoder has the encoder's widths; any other VAE as it is."""
    if not isinstance(vae, NarrowDecoder) or vae.is_pruned:
        return vae
    own = ("decoder_block_out_channels", "decoder_norm_groups", "auto_map")
    stock = vae.STOCK.from_config({k: v for k, v in vae.config.items() if k not in own})
    stock.load_state_dict(vae.state_dict())
    return stock.to(vae.device, vae.dtype).eval()


def vae_obstacles(vae: nn.Module) -> tuple[str, ...]:
    """Why an autoencoder is not one of diffusers' own class."""
    if not isinstance(vae, NarrowDecoder):
        return ()
    return (f"vae.decoder: its widths {vae.decoder_widths} are not its encoder's",)
