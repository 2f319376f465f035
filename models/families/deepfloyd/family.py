"""DeepFloyd IF: a UNet2DConditionModel that denoises pixels, conditioned on T5's states, and predicts its variance.

The T5 encoder attends to a caption's own tokens; the UNet attends to all 77 that the pipeline pads it to. A second
stage also takes the first's picture, upscaled and noised (cascade.py).
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning, cleans_captions
from slimstep.models.denoiser import NUM_TOKENS, Denoiser
from slimstep.models.families.deepfloyd.denoiser import DeepFloydDenoiser
from slimstep.models.families.exported import Exported, block_map
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.families.unet2d.stock import stock_config, to_stock
from slimstep.models.folder import (
    CHECKER,
    absent_parts,
    check_index,
    check_tables,
    final_folder,
    lacking_checker,
    stored_dtype,
)
from slimstep.models.networks import check_tokenizers, load_networks, with_unet

NAME = "DeepFloyd IF: an IFPipeline or IFSuperResolutionPipeline with a UNet2DConditionModel"
PART = "unet"
NETWORK = PrunableUNet2DConditionModel
IS_CONDITIONAL = GUIDES = True
DRAWS_VIDEOS = False
PARTS, TEXT_PARTS = ("unet", "scheduler"), ("tokenizer", "text_encoder")
RGB, RGB_AND_VARIANCE = 3, 6
PIPELINES = {"IFPipeline": RGB, "IFSuperResolutionPipeline": 2 * RGB}  # and the channels that their networks take
NOT_NEEDED = (*CHECKER, "watermarker")


def matches(index: Mapping[str, Any]) -> bool:
    return index.get("_class_name") in PIPELINES and index["unet"][1] in (NETWORK.__name__, NETWORK.STOCK.__name__)


def owns(network: nn.Module) -> bool:
    return network.config.out_channels == RGB_AND_VARIANCE


# ---- loading and exporting ----


def is_in(names: Collection[str]) -> bool:
    return False  # diffusers reads none


def check_single_file(file: str | Path, config: str | None, allow_pickle: bool) -> None:
    raise ValueError(f"model {str(file)!r} is no single file of DeepFloyd IF: it has folders and hub ids alone")


def check(name_or_path: str | Path) -> None:
    check_parts(name_or_path, (*PARTS, *TEXT_PARTS))


def check_parts(name_or_path: str | Path, parts: Sequence[str]) -> None:
    """The same, where so much is needed of the pipeline."""
    name = str(name_or_path)
    check_tables(name)
    index = DiffusionPipeline.load_config(name)
    refines = index.get("_class_name") == "IFSuperResolutionPipeline"
    check_index(name, index, (*parts, "image_noising_scheduler") if refines else parts)
    folder = final_folder(name)
    if folder and (absent := [part for part in absent_parts(folder, index) if part not in NOT_NEEDED]):
        raise ValueError(f"model {name!r} is incomplete: its model_index.json names {absent}, which it lacks")
    fields = UNet2DConditionModel.load_config(name, subfolder="unet")
    taken, given = fields.get("in_channels", 4), fields.get("out_channels", 4)
    if (taken, given) != (expected := (PIPELINES[index["_class_name"]], RGB_AND_VARIANCE)):
        channels = f"in_channels={taken} and out_channels={given}"
        raise ValueError(f"model {name!r} has a UNet with {channels}; only one of RGB images that predicts a variance "
                         f"is supported in an {index['_class_name']}, {expected[0]} and {expected[1]}")  # fmt: skip
    if refines and fields.get("class_embed_type") != "timestep":
        kind = f"class_embed_type={fields.get('class_embed_type')}"
        raise ValueError(f"model {name!r} has a UNet with {kind}; that of an IFSuperResolutionPipeline takes how noisy "
                         "its picture is as a timestep")  # fmt: skip


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
    check_tokenizers(pipeline := read_without((), name_or_path, dtype, variant, allow_pickle))
    return pipeline


def read_without(
    parts: Sequence[str], name_or_path: str | Path, dtype: torch.dtype | None, variant: str | None, allow_pickle: bool
) -> DiffusionPipeline:
    """The pipeline without some of its parts."""
    index = DiffusionPipeline.load_config(name_or_path)
    options = {"variant": variant, "dtype": dtype or stored_dtype(name_or_path, variant)}
    options["use_safetensors"] = None if allow_pickle else True
    absent = {**lacking_checker(name_or_path), **dict.fromkeys(parts)}
    if "safety_checker" in absent and "watermarker" in index:
        absent["watermarker"] = None
    own = load_networks(name_or_path, index, NETWORK, {*absent}, **options)
    # Without these first: diffusers would look for the class files of an export of ours, and ask for trust.
    rest = DiffusionPipeline.from_pretrained(name_or_path, **{**dict.fromkeys(own), **absent}, **options)
    return with_unet(rest, **own)


def exported(pipeline: DiffusionPipeline) -> Exported:
    stock = stock_config(pipeline.unet)
    unet = pipeline.unet if stock.config is None else to_stock(pipeline.unet)
    return Exported(with_unet(pipeline, unet), stock.obstacles, block_map(pipeline.unet, stock.paths))


# ---- conditioning, pixels ----


def denoiser(network: nn.Module, prediction_type: str, sample_shape: tuple[int, ...]) -> Denoiser:
    return DeepFloydDenoiser(prediction_type, sample_shape)


def encode(pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device | None = None) -> Conditioning:
    return Conditioning({"text": encoded(pipeline, list(prompts), device, False)[0]})


def unconditional(pipeline: DiffusionPipeline, device: torch.device | None = None) -> Conditioning:
    return Conditioning({"text": encoded(pipeline, "", device, True)[1]})


def encoded(
    pipeline: DiffusionPipeline, prompts: str | list[str], device: torch.device | None, guides: bool
) -> tuple[Tensor, Tensor | None]:
    """T5's states [B, 77, E] of prompts, and those of the empty one, by the pipeline's own `encode_prompt`."""
    device = device or pipeline.text_encoder.device
    return pipeline.encode_prompt(prompts, guides, device=device, clean_caption=cleans_captions())


def tokens(pipeline: DiffusionPipeline) -> int:
    return NUM_TOKENS


def call(pipeline: DiffusionPipeline, guidance_scale: float, noise: Tensor | None = None) -> dict[str, Any]:
    return {"guidance_scale": guidance_scale}  # the pipeline takes no noise, and draws its own from the generators


def channels(network: nn.Module) -> int:
    return network.config.out_channels // 2


def frames(network: nn.Module) -> int | None:
    return None


def draws_rectangles(pipeline: DiffusionPipeline) -> bool:
    return False


def shrinks(network: nn.Module) -> int:
    return 2 ** (len(network.config.block_out_channels) - 1)


def flow(config: Mapping[str, Any]) -> None:
    return None


def codec(pipeline: DiffusionPipeline) -> None:
    return None
