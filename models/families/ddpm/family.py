"""Unconditional DDPMs (Ho et al. 2020): a UNet2DModel in pixel space, no text, no VAE, no guidance."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import NUM_TOKENS, Denoiser
from slimstep.models.families.ddpm.denoiser import UNet2DDenoiser
from slimstep.models.families.ddpm.network import PrunableUNet2DModel
from slimstep.models.families.ddpm.stock import stock_config, to_stock
from slimstep.models.families.exported import Exported, block_map
from slimstep.models.folder import check_index, check_tables, final_folder, stored_dtype
from slimstep.models.networks import load_networks, with_unet

NAME = "unconditional DDPM: a DDPMPipeline or DDIMPipeline with a UNet2DModel"
PART = "unet"
NETWORK = PrunableUNet2DModel
IS_CONDITIONAL = GUIDES = False
DRAWS_VIDEOS = False


def matches(index: Mapping[str, Any]) -> bool:
    is_pixels = index.get("_class_name") in ("DDPMPipeline", "DDIMPipeline")
    return is_pixels and index["unet"][1] in (NETWORK.__name__, NETWORK.STOCK.__name__)


def owns(network: nn.Module) -> bool:
    return True


# ---- loading and exporting ----


def is_in(names: Collection[str]) -> bool:
    return False  # there are none


def check_single_file(file: str | Path, config: str | None, allow_pickle: bool) -> None:
    raise ValueError(f"model {str(file)!r} is no single file of a DDPM: there are folders and hub ids of them alone")


def check(name_or_path: str | Path) -> None:
    name = str(name_or_path)
    check_tables(name)
    check_index(name, DiffusionPipeline.load_config(name), ("unet", "scheduler"))
    if (folder := final_folder(name)) and not (folder / "unet/config.json").is_file():
        raise ValueError(f"model {name!r} is incomplete: it lacks unet/config.json")
    fields = UNet2DModel.load_config(name, subfolder="unet")
    taken, given = fields.get("in_channels", 3), fields.get("out_channels", 3)
    if (taken, given) != (3, 3):
        channels = f"in_channels={taken} and out_channels={given}"
        raise ValueError(f"model {name!r} has a UNet with {channels}; only one of RGB images is supported, 3 and 3")
    if fields.get("class_embed_type") or fields.get("num_class_embeds"):
        raise ValueError(f"model {name!r} is conditioned on classes; only unconditional ones are supported")


def read(
    name_or_path: str | Path,
    dtype: torch.dtype | None,
    variant: str | None,
    allow_pickle: bool,
    single_file_config: str | None,
    vae: str | None,
) -> DiffusionPipeline:
    if vae:
        raise ValueError(f"model.vae={vae} has no place in a model of pixels")
    index = DiffusionPipeline.load_config(name_or_path)
    options = {"variant": variant, "dtype": dtype or stored_dtype(name_or_path, variant)}
    use_safetensors = None if allow_pickle else True
    unet = load_networks(name_or_path, index, NETWORK, use_safetensors=use_safetensors, **options)["unet"]
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(name_or_path, subfolder="scheduler")
    return getattr(diffusers, index["_class_name"])(unet=unet, scheduler=scheduler)


def exported(pipeline: DiffusionPipeline) -> Exported:
    stock = stock_config(pipeline.unet)
    unet = pipeline.unet if stock.config is None else to_stock(pipeline.unet)
    return Exported(with_unet(pipeline, unet), stock.obstacles, block_map(pipeline.unet, stock.paths))


# ---- conditioning, latents ----


def denoiser(network: nn.Module, prediction_type: str, sample_shape: tuple[int, ...]) -> Denoiser:
    return UNet2DDenoiser(prediction_type, sample_shape)


def encode(pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device | None = None) -> Conditioning:
    return Conditioning()


def unconditional(pipeline: DiffusionPipeline, device: torch.device | None = None) -> Conditioning:
    return Conditioning()


def tokens(pipeline: DiffusionPipeline) -> int:
    return NUM_TOKENS


def call(pipeline: DiffusionPipeline, guidance_scale: float, noise: Tensor | None = None) -> dict[str, Any]:
    raise ValueError(f"a {type(pipeline).__name__} draws noise of its own, and takes neither prompts nor guidance")


def channels(network: nn.Module) -> int:
    return network.config.in_channels


def frames(network: nn.Module) -> int | None:
    return None


def draws_rectangles(pipeline: DiffusionPipeline) -> bool:
    return True


def shrinks(network: nn.Module) -> int:
    return 2 ** (len(network.config.block_out_channels) - 1)


def flow(config: Mapping[str, Any]) -> None:
    return None


def codec(pipeline: DiffusionPipeline) -> None:
    return None
