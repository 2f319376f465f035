"""Stable Diffusion, and any other pipeline with a UNet2DConditionModel, a VAE and a text encoder, SDXL's too."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.conversion_mapping import get_model_conversion_mapping

from slimstep.models import single_file
from slimstep.models.autoencoder import load_vae, stock_vae, vae_obstacles
from slimstep.models.checkpoint import is_single_file
from slimstep.models.conditioning import Conditioning
from slimstep.models.decoding import has_statistics
from slimstep.models.denoiser import Denoiser
from slimstep.models.families.deepfloyd import family as deepfloyd
from slimstep.models.families.exported import Exported, block_map
from slimstep.models.families.unet2d.denoiser import UNet2DConditionDenoiser
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.families.unet2d.stock import stock_config, to_stock
from slimstep.models.families.unet2d.text import encode_prompts, encode_unconditional
from slimstep.models.folder import check_folder, lacking_checker, stored_dtype
from slimstep.models.networks import check_tokenizers, load_networks, with_unet
from slimstep.models.single_file import load_single_file
from slimstep.models.sizes import settle_sizes

NAME = "Stable Diffusion: a pipeline with a UNet2DConditionModel and a VAE"
PART = "unet"
NETWORK = PrunableUNet2DConditionModel
IS_CONDITIONAL = GUIDES = True
DRAWS_VIDEOS = False
check_single_file = single_file.check_single_file


def matches(index: Mapping[str, Any]) -> bool:
    names = (NETWORK.__name__, NETWORK.STOCK.__name__)
    return index["unet"][1] in names and not deepfloyd.matches(index)


def owns(network: nn.Module) -> bool:
    return not deepfloyd.owns(network)


def is_in(names: Collection[str]) -> bool:
    return "input_blocks.0.0.weight" in names


# ---- loading and exporting ----


def check(name_or_path: str | Path) -> None:
    check_folder(name_or_path)


def read(
    name_or_path: str | Path,
    dtype: torch.dtype | None,
    variant: str | None,
    allow_pickle: bool,
    single_file_config: str | None,
    vae: str | None,
) -> DiffusionPipeline:
    if is_single_file(name_or_path):
        pipeline = load_single_file(name_or_path, single_file_config, dtype, vae, allow_pickle)
    else:
        dtype = dtype or stored_dtype(name_or_path, variant)
        pipeline = load_folder(name_or_path, dtype, variant, allow_pickle, vae)
    settle_sizes(pipeline)
    check_tokenizers(pipeline)
    has_statistics(pipeline)  # ValueError for damaged ones
    return pipeline


def load_folder(
    name_or_path: str | Path, dtype: torch.dtype, variant: str | None, allow_pickle: bool, vae: str | None
) -> DiffusionPipeline:
    """The pipeline of a folder or hub id, with another VAE where one is named."""
    options = {"variant": variant, "dtype": dtype, "use_safetensors": None if allow_pickle else True}
    absent, index = lacking_checker(name_or_path), DiffusionPipeline.load_config(name_or_path)
    own = load_networks(name_or_path, index, NETWORK, {*absent, *(["vae"] if vae else [])}, **options)
    if vae:
        own["vae"] = load_vae(vae, AutoencoderKL.load_config(name_or_path, subfolder="vae"), dtype, allow_pickle)
    # Without these first: diffusers would look for the class files of an export of ours, and ask for trust.
    rest = DiffusionPipeline.from_pretrained(name_or_path, **{**dict.fromkeys(own), **absent}, **options)
    return with_unet(rest, **own)


def exported(pipeline: DiffusionPipeline) -> Exported:
    stock, vae = stock_config(pipeline.unet), stock_vae(pipeline.vae)
    unet, obstacles = pipeline.unet if stock.config is None else to_stock(pipeline.unet), stock.obstacles
    obstacles += vae_obstacles(vae)
    keep_text_names(pipeline)
    return Exported(with_unet(pipeline, unet, vae=vae), obstacles, block_map(pipeline.unet, stock.paths))


def keep_text_names(pipeline: DiffusionPipeline) -> None:
    """Make the text encoder's names be saved as published folders have them, with `text_model.`, wherever it is from.

    Transformers before 5.6 would find none of the others, and draw random weights; those since read both.
    """
    if type(encoder := pipeline.text_encoder) is CLIPTextModel:
        encoder._weight_conversions = get_model_conversion_mapping(encoder, add_legacy=False)


# ---- conditioning, latents ----


def denoiser(network: nn.Module, prediction_type: str, sample_shape: tuple[int, ...]) -> Denoiser:
    return UNet2DConditionDenoiser(prediction_type, sample_shape)


def encode(pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device | None = None) -> Conditioning:
    return encode_prompts(pipeline, prompts, device or pipeline.text_encoder.device)


def unconditional(pipeline: DiffusionPipeline, device: torch.device | None = None) -> Conditioning:
    return encode_unconditional(pipeline, device or pipeline.text_encoder.device)


def tokens(pipeline: DiffusionPipeline) -> int:
    return pipeline.tokenizer.model_max_length


def call(pipeline: DiffusionPipeline, guidance_scale: float, noise: Tensor | None = None) -> dict[str, Any]:
    return {"guidance_scale": guidance_scale} | ({} if noise is None else {"latents": noise})


def channels(network: nn.Module) -> int:
    return network.config.in_channels


def frames(network: nn.Module) -> int | None:
    return None


def draws_rectangles(pipeline: DiffusionPipeline) -> bool:
    return hasattr(pipeline, "_is_unet_config_sample_size_int")  # StableDiffusionPipeline; others multiply the list


def shrinks(network: nn.Module) -> int:
    return 2 ** (len(network.config.block_out_channels) - 1)


def flow(config: Mapping[str, Any]) -> None:
    return None


def codec(pipeline: DiffusionPipeline) -> AutoencoderKL:
    return pipeline.vae
