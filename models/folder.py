"""Pipelines as diffusers folders or hub ids: what is looked at before anything is loaded, and the parts of ours."""

from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open

from models.quiet import one_line
from models.unet import PrunableUNet2DConditionModel
from models.vae import NarrowAutoencoderKL

LOADABLE_UNETS = (UNet2DConditionModel.__name__, PrunableUNet2DConditionModel.__name__)
WEIGHTS = (".safetensors", ".bin")
CHECKER = ("safety_checker", "feature_extractor")  # nothing here asks for them
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_folder(name_or_path: str | Path) -> None:
    """ValueError unless this is a pipeline with a UNet that can be pruned, and, if a folder, has all parts in use."""
    name = str(name_or_path)
    try:
        index = DiffusionPipeline.load_config(name)
        fields = UNet2DConditionModel.load_config(name, subfolder="unet")
    except OSError as error:
        if Path(name).is_dir():
            raise ValueError(f"model {name!r} is no UNet pipeline saved by diffusers: {one_line(error)}") from error
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        way = "download it once without HF_HUB_OFFLINE=1" if offline else "check the name and the network"
        raise ValueError(f"model {name!r} is no folder, and not in the hub cache: {way}, or give a folder") from error
    if fields.get("_class_name") not in LOADABLE_UNETS:
        found = fields.get("_class_name")
        raise ValueError(f"model {name!r} has the UNet class {found}; pruning needs one of {LOADABLE_UNETS}")
    taken, given = fields.get("in_channels", 4), fields.get("out_channels", 4)
    if taken != given:
        told = f"in_channels={taken} and out_channels={given}, as those for inpainting, editing or depth"
        raise ValueError(f"model {name!r} has a UNet with {told}; only one that takes nothing but latents is supported")
    # transformers makes up an empty tokenizer where the folder is missing.
    folder = final_folder(name)
    if folder and (absent := [part for part in absent_parts(folder, index) if part not in CHECKER]):
        raise ValueError(f"model {name!r} is incomplete: its model_index.json names {absent}, which it lacks")


def absent_parts(folder: str | Path, index: dict[str, Any]) -> list[str]:
    """The parts that a model_index.json names and that are not there."""
    return [part for part in parts_of(index) if not (Path(folder) / part).is_dir()]


def without_checker(index: dict[str, Any]) -> dict[str, Any]:
    """What a pipeline is loaded with to have no safety checker, as far as its class knows one."""
    absent = dict.fromkeys(part for part in CHECKER if part in index)
    return absent | ({"requires_safety_checker": False} if "safety_checker" in index else {})


def lacking_checker(name_or_path: str | Path) -> dict[str, Any]:
    """The same for a folder that lacks parts it names, nothing for any other."""
    folder, index = final_folder(name_or_path), DiffusionPipeline.load_config(name_or_path)
    return without_checker(index) if folder and absent_parts(folder, index) else {}


def check_variant(name_or_path: str | Path, variant: str | None) -> None:
    """ValueError for a variant of the weights that a folder's UNet does not have; None is the plain one."""
    files = [path.name for path in (Path(name_or_path) / "unet").glob("*") if path.suffix in WEIGHTS]
    there = {variant_of(name) for name in files}
    if there and variant not in there:
        choices = " or ".join(sorted(name or "null" for name in there))
        raise ValueError(f"model {str(name_or_path)!r} has no weights of variant={variant}: choose {choices}")


def check_pickles(name_or_path: str | Path, variant: str | None, allow_pickle: bool) -> None:
    """ValueError for parts whose weights are nothing but pickles, where these are not allowed."""
    parts = parts_of(DiffusionPipeline.load_config(name_or_path))
    if not allow_pickle and (pickled := [part for part in parts if is_pickled(name_or_path, part, variant)]):
        told = f"holds only pickles in {pickled}, which may run code"
        raise ValueError(f"model {str(name_or_path)!r} {told}: model.allow_pickle=true reads them")


def is_pickled(name_or_path: str | Path, part: str, variant: str | None) -> bool:
    """Whether a part's weights of this variant are .bin files alone, as far as they are on this machine."""
    if (folder := folder_of(name_or_path)) is None:
        return False
    files = [path for path in (folder / part).glob("*") if path.suffix in WEIGHTS]
    return {path.suffix for path in files if variant_of(path.name) == variant} == {".bin"}


def variant_of(file_name: str) -> str | None:
    """'fp16' for diffusion_pytorch_model.fp16.safetensors and its shards, None for the plain one."""
    return file_name.split(".")[1].split("-")[0] if file_name.count(".") == 2 else None


def parts_of(index: dict[str, Any]) -> list[str]:
    """The parts that a model_index.json names."""
    return [part for part, value in index.items() if isinstance(value, (list, tuple)) and value[0] is not None]


def hub_configuration(hub_id: str) -> Path:
    """A folder with the configuration and tokenizers of a hub id, from the cache or, but offline, from the hub."""
    return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=["*.json", "*.txt"]))


def cached_configuration(hub_id: str) -> Path | None:
    """The same, where the hub cache holds that of every part."""
    if (folder := cached_folder(hub_id)) is None:
        return None
    index = DiffusionPipeline.load_config(folder)
    return folder if set(absent_parts(folder, index)) <= {*CHECKER} else None


def folder_of(name_or_path: str | Path) -> Path | None:
    """The folder itself, or the one in which the hub cache has a hub id."""
    return Path(name_or_path) if Path(name_or_path).is_dir() else cached_folder(str(name_or_path))


def final_folder(name_or_path: str | Path) -> Path | None:
    """The same, where nothing can be added to it: a folder of one's own, or without a network the hub cache's."""
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    return folder_of(name_or_path) if offline or Path(name_or_path).is_dir() else None


def cached_folder(hub_id: str) -> Path | None:
    """Where the hub cache has a pipeline; snapshot_download would want its repository's every file, unused ones too."""
    index = huggingface_hub.try_to_load_from_cache(hub_id, DiffusionPipeline.config_name)
    return Path(index).parent if isinstance(index, str) else None


def stored_dtype(name_or_path: str | Path, variant: str | None) -> torch.dtype:
    """What the UNet of a folder or hub id is stored in. ValueError where it has no safetensors file."""
    if (folder := folder_of(name_or_path)) is None:
        raise ValueError("it is not in the hub cache, so its dtype is not known: say which, as float16")
    files = [path for path in (folder / "unet").glob("*.safetensors") if variant_of(path.name) == variant]
    if not files:
        raise ValueError("it has no unet/*.safetensors, which would tell its dtype: give one")
    with safe_open(files[0], "pt") as opened:
        return DTYPES[opened.get_slice(next(iter(opened.keys()))).get_dtype()]


def load_unet(name_or_path: str | Path, **options) -> PrunableUNet2DConditionModel:
    """The `unet` of a diffusers folder or hub id; ValueError where config and weights do not belong together."""
    load = PrunableUNet2DConditionModel.from_pretrained
    if options["use_safetensors"] is None and is_pickled(name_or_path, "unet", options["variant"]):
        options["use_safetensors"] = False  # shards of pickles are not looked for otherwise
    misfit = f"model {str(name_or_path)!r}: unet/config.json does not belong to the weights"
    try:
        unet, info = load(name_or_path, subfolder="unet", output_loading_info=True, **options)
    except ValueError as error:
        raise ValueError(f"{misfit}: {one_line(error).split(' If you want')[0]}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{misfit}: {len(missing)} that it asks for are absent ({', '.join(missing[:3])} …)")
    return unet


def load_narrow_vae(name_or_path: str | Path, **options) -> dict[str, NarrowAutoencoderKL]:
    """{"vae": …} where a pipeline's decoder is a narrow one; nothing where the VAE is diffusers' own."""
    fields = AutoencoderKL.load_config(name_or_path, subfolder="vae")
    if fields.get("_class_name") != NarrowAutoencoderKL.__name__:
        return {}
    vae, info = NarrowAutoencoderKL.from_pretrained(name_or_path, subfolder="vae", output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"vae/config.json does not belong to the weights: {missing[0]} … are absent")
    return {"vae": vae}
