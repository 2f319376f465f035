"""Pipelines as diffusers folders or hub ids: what is looked at before anything is loaded."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from slimstep.engine.quiet import one_line, preview
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel

LOADABLE_UNETS = (UNet2DConditionModel.__name__, PrunableUNet2DConditionModel.__name__)
WEIGHTS = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)[.-].*(safetensors|bin)")
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)?\.safetensors")
TABLES = ("config.json", "scheduler_config.json", "tokenizer_config.json", "tokenizer.json", "preprocessor_config.json")
REQUIRED = ("unet", "vae", "scheduler")
CHECKER = ("safety_checker", "feature_extractor")  # nothing here asks for them
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_folder(name_or_path: str | Path) -> None:
    """ValueError unless this is a pipeline with a UNet that can be pruned, and, if a folder, has all parts in use."""
    name = str(name_or_path)
    check_tables(name)
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
        kind = fields.get("_class_name")
        raise ValueError(f"model {name!r} has the UNet class {kind}; pruning needs one of {LOADABLE_UNETS}")
    taken, returned = fields.get("in_channels", 4), fields.get("out_channels", 4)
    if taken != returned:
        message = f"in_channels={taken} and out_channels={returned}, as those for inpainting, editing or depth"
        raise ValueError(
            f"model {name!r} has a UNet with {message}; only one that takes nothing but latents is supported"
        )
    check_index(name, index)
    # transformers makes up an empty tokenizer where the folder is missing.
    folder = final_folder(name)
    if folder and (absent := [part for part in absent_parts(folder, index) if part not in CHECKER]):
        raise ValueError(f"model {name!r} is incomplete: its model_index.json names {absent}, which it lacks")


def check_tables(name: str) -> None:
    """ValueError for a file of a folder that is no JSON, or holds something else than a table."""
    if (folder := folder_of(name)) is None or not (index := folder / DiffusionPipeline.config_name).is_file():
        return
    parts = parts_of(read_table(name, folder, index))
    for file in (folder / part / table for part in parts for table in TABLES):
        if file.is_file():
            read_table(name, folder, file)


def read_table(name: str, folder: Path, file: Path) -> dict[str, Any]:
    """What a JSON file of a model holds. ValueError, which names the file, where that is no table."""
    place = f"model {name!r} is damaged: {file.relative_to(folder)}"
    try:
        table = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{place} is no JSON file ({one_line(error)})") from error
    if not isinstance(table, dict):
        raise ValueError(f"{place} must hold a table, and holds {json.dumps(table):.40}")
    return table


def check_index(name: str, index: dict[str, Any], required: Sequence[str] = REQUIRED) -> None:
    """ValueError for a model_index.json that names no pipeline of diffusers, lacks a part that is required, or names
    one otherwise than by its class."""
    place = f"model {name!r}: its {DiffusionPipeline.config_name}"
    kind = index.get("_class_name")
    if not isinstance(kind, str) or not hasattr(diffusers, kind):
        raise ValueError(f"{place} names the pipeline class {kind!r}, which diffusers does not have")
    for part, value in index.items():
        pair = value if isinstance(value, (list, tuple)) and not part.startswith("_") else [None, None]
        if len(pair) != 2 or len({type(word) for word in pair}) != 1 or not isinstance(pair[0], (str, type(None))):
            raise ValueError(f"{place} has {part}={value}, which must be [library, class]")
    if lacking := [part for part in required if part not in parts_of(index)]:
        raise ValueError(f"{place} names no {' and no '.join(lacking)}")


def check_weights(name_or_path: str | Path, variant: str | None) -> None:
    """ValueError, which names the file, for .safetensors that are torn, or parts of a network that are not all there.

    Headers alone are read.
    """
    if (folder := final_folder(name_or_path)) is None:
        return
    for part in parts_of(DiffusionPipeline.load_config(folder)):
        files = [file for file in weight_files(folder / part) if file.suffix == ".safetensors"]
        of_variant = [file for file in files if variant_of(file.name) == variant]
        try:
            keys = {file.name: stored_keys(file) for file in of_variant or files}
            if of_variant and all(map(SHARD.fullmatch, keys)):
                check_shards(folder / part, keys)
        except ValueError as error:
            raise ValueError(f"model {str(name_or_path)!r} is incomplete or damaged: {part}/{error}") from error


def stored_keys(file: Path) -> set[str]:
    """The names in a .safetensors file. ValueError where it is torn."""
    try:
        with safe_open(file, "pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file.name} is torn, or no safetensors file ({one_line(error)})") from error


def check_shards(folder: Path, keys: dict[str, set[str]]) -> None:
    """ValueError for shards, {file name: its keys}, that are not what their index says, or have none."""
    stem, infix = SHARD.fullmatch(next(iter(keys))).groups()
    name, _, variant = stem.partition(".")
    file = folder / f"{name}.safetensors.index{infix or (variant and f'.{variant}')}.json"
    try:
        places = json.loads(file.read_text())["weight_map"].items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file.name}, the index of {preview(keys)}, cannot be read: {one_line(error)}") from error
    if absent := sorted({shard for _, shard in places} - keys.keys()):
        raise ValueError(f"{file.name} names shards that are not there: {preview(absent)}")
    if lost := sorted(f"{key} of {shard}" for key, shard in places if key not in keys[shard]):
        raise ValueError(f"{file.name} names weights that their shards lack: {preview(lost)}")


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
    """ValueError for a variant of the weights that a folder's network does not have; None is the plain one."""
    files = [file for part in ("unet", "transformer") for file in weight_files(Path(name_or_path) / part)]
    existing = {variant_of(file.name) for file in files}
    if existing and variant not in existing:
        choices = " or ".join(sorted(name or "null" for name in existing))
        raise ValueError(f"model {str(name_or_path)!r} has no weights of variant={variant}: choose {choices}")


def check_pickles(name_or_path: str | Path, variant: str | None, allow_pickle: bool) -> None:
    """ValueError for parts whose weights are nothing but pickles, where these are not allowed."""
    parts = parts_of(DiffusionPipeline.load_config(name_or_path))
    if not allow_pickle and (pickled := [part for part in parts if is_pickled(name_or_path, part, variant)]):
        message = f"holds only pickles in {pickled}, which may run code"
        raise ValueError(f"model {str(name_or_path)!r} {message}: model.allow_pickle=true reads them")


def is_pickled(name_or_path: str | Path, part: str, variant: str | None) -> bool:
    """Whether a part's weights of this variant are .bin files alone, as far as they are on this machine."""
    if (folder := folder_of(name_or_path)) is None:
        return False
    files = weight_files(folder / part)
    return {path.suffix for path in files if variant_of(path.name) == variant} == {".bin"}


def weight_files(folder: Path) -> list[Path]:
    """The files of weights of one network, of every variant."""
    return sorted(path for path in folder.glob("*") if WEIGHTS.fullmatch(path.name))


def variant_of(file_name: str) -> str | None:
    """'fp16' for diffusion_pytorch_model.fp16.safetensors and its shards, None for the plain one."""
    return file_name.split(".")[1].split("-")[0] if file_name.count(".") == 2 else None


def parts_of(index: dict[str, Any]) -> list[str]:
    """The parts that a model_index.json names."""
    pairs = ((part, value) for part, value in index.items() if not part.startswith("_"))
    return [part for part, value in pairs if isinstance(value, (list, tuple)) and value and value[0] is not None]


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
    try:
        index = huggingface_hub.try_to_load_from_cache(hub_id, DiffusionPipeline.config_name)
    except HFValidationError:  # no name of a repository
        return None
    return Path(index).parent if isinstance(index, str) else None


def stored_dtype(name_or_path: str | Path, variant: str | None, part: str = "unet") -> torch.dtype:
    """What the network `part` of a folder or hub id is stored in. ValueError where it has no safetensors file."""
    if (folder := folder_of(name_or_path)) is None:
        raise ValueError("it is not in the hub cache, so its dtype is not known: say which, as float16")
    files = [path for path in (folder / part).glob("*.safetensors") if variant_of(path.name) == variant]
    if not files:
        raise ValueError(f"it has no {part}/*.safetensors, which would tell its dtype: give one")
    with safe_open(files[0], "pt") as opened:
        if not (keys := list(opened.keys())):
            raise ValueError(f"{part}/{files[0].name} holds no weights")
        return DTYPES[opened.get_slice(keys[0]).get_dtype()]
