"""LoRAs made for the stock UNet: fused into a teacher's weights, or loaded into a pruned UNet as far as they fit."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft, is_peft_available
from diffusers.utils.state_dict_utils import StateDictType
from torch import Tensor, nn

from models.quiet import one_line, quiet

log = logging.getLogger("slimstep")
FILES = (".safetensors", ".bin", ".pt", ".ckpt")
PLAIN = dict.fromkeys(("weight_name", "local_files_only", "cache_dir", "force_download", "proxies", "token", "revision",
                       "subfolder", "user_agent"))  # fmt: skip


@dataclass(frozen=True)
class LoraFit:
    """Module paths that a LoRA adapts: those of the UNet that took it, and those that are no longer there.

    texts: how many modules of the text encoders took it.
    """

    applied: tuple[str, ...]
    left_out: tuple[str, ...]
    texts: int = 0


def load_lora(pipeline: DiffusionPipeline, source: str | Path | dict[str, Tensor], adapter: str = "default") -> LoraFit:
    """Load a LoRA (a file, a folder, a hub id or a state dict) into the pipeline, without what was pruned away.

    Its parts for the text encoders, if it has some, are loaded whole.

    Raises ValueError where nothing of it fits the UNet, and it has nothing for the text encoders; and for a DoRA.
    """
    with quiet():
        weights, metadata = read_lora(pipeline, source)
    present = {name for name, _ in pipeline.unet.named_modules()}
    unet_keys = {key: module_of(key) for key in weights if key.startswith("unet.")}
    applied = {path for path in unet_keys.values() if path in present}
    left_out = set(unet_keys.values()) - applied
    encoders = {part: encoder for part, encoder in text_parts(pipeline).items() if has_part(weights, part)}
    if not applied and (left_out or not encoders):
        told = f"; it adapts {sorted(left_out)[:3]}…" if left_out else ""
        raise ValueError(f"LoRA {source!s:.80} has no weights for this UNet{told}")
    fitting = {key: value for key, value in weights.items() if unet_keys.get(key) not in left_out}
    scales = {part: metadata if has_part(metadata, part) else None for part in ("unet", *encoders)}
    options = {"network_alphas": None, "adapter_name": adapter, "_pipeline": pipeline}
    with quiet():
        if applied:
            pipeline.load_lora_into_unet(fitting, unet=pipeline.unet, metadata=scales["unet"], **options)
        for part, encoder in encoders.items():
            pipeline.load_lora_into_text_encoder(
                weights, text_encoder=encoder, prefix=part, lora_scale=pipeline.lora_scale, metadata=scales[part],
                **options,
            )  # fmt: skip
    return LoraFit(tuple(sorted(applied)), tuple(sorted(left_out)), sum(map(count_adapted, encoders.values())))


def read_lora(
    pipeline: DiffusionPipeline, source: str | Path | dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its weights, `unet.PATH.lora_A.weight` for the UNet and diffusers' names for text encoders, and its metadata.

    Alphas that come as tensors, as kohya's do, are in the weights, and then there is no metadata. Raises ValueError for
    a DoRA that diffusers would read as a LoRA.
    """
    stored, metadata = _fetch_state_dict(source, use_safetensors=True, allow_pickle=True, **PLAIN)
    if any("dora_scale" in key for key in stored):
        raise ValueError("it is a DoRA, whose magnitudes (dora_scale) diffusers leaves out: fuse a LoRA without them")
    weights, alphas = pipeline.lora_state_dict(dict(stored), unet_config=pipeline.unet.config)
    weights = with_alphas(weights, alphas or {})
    unet = {key: value for key, value in weights.items() if key.startswith("unet.")}
    texts = {key: value for key, value in weights.items() if key not in unet}
    texts = convert_state_dict_to_diffusers(texts, StateDictType.DIFFUSERS_OLD)
    return {**convert_unet_state_dict_to_peft(unet), **texts}, metadata if metadata and not alphas else {}


def with_alphas(weights: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """The weights with every `up` times alpha / rank, so that none needs a factor.

    Diffusers does not find the modules of alphas that differ from most of the others.
    """
    scaled = dict(weights)
    for key, down in weights.items():
        alpha = alphas.get(f"{key.split('.lora.')[0]}.alpha")  # as diffusers names it
        if key.endswith(".down.weight") and alpha is not None:
            up = key.replace(".down.weight", ".up.weight")
            scaled[up] = weights[up].float() * (alpha / len(down))
    return scaled


def fuse_loras(pipeline: DiffusionPipeline, loras: Sequence[Mapping[str, Any]]) -> None:
    """Add every LoRA, {path, scale}, to the weights of UNet and text encoders, in order; no adapter is left behind.

    Raises ValueError, by `check_loras`, or for one that cannot be read or does not fit.
    """
    for lora in loras:
        path, scale = lora["path"], float(lora.get("scale", 1.0))
        try:
            fit = load_lora(pipeline, path)
            with quiet():
                pipeline.fuse_lora(components=adapted_parts(pipeline), lora_scale=scale)
                pipeline.unload_lora_weights()
        except Exception as error:  # diffusers and peft raise whatever a file of another kind makes them stumble over
            raise ValueError(f"model.loras: {path} cannot be fused: {one_line(error)}") from error
        gone = f", {len(fit.left_out)} modules of it are not in this UNet" if fit.left_out else ""
        log.info(f"LoRA {path} times {scale:g}: fused into {len(fit.applied)} modules of the UNet and "
                 f"{fit.texts} of the text encoders{gone}")  # fmt: skip


def check_loras(loras: Sequence[Any]) -> None:
    """ValueError, before anything is loaded, for entries that are none, files that are not there, or a lack of peft."""
    for lora in loras:
        if not isinstance(lora, Mapping) or not {"path"} <= set(lora) <= {"path", "scale"}:
            raise ValueError(f"model.loras={list(loras)} must be a list of tables, as [{{path: FILE, scale: 0.8}}]")
        scale = lora.get("scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < float("inf"):
            raise ValueError(f"model.loras: scale={scale} of {lora['path']} is no number")
        if Path(lora["path"]).suffix in FILES and not Path(lora["path"]).is_file():
            raise ValueError(f"model.loras: {lora['path']} does not exist")
    if loras and not is_peft_available():
        raise ValueError("model.loras needs peft: pip install -e '.[lora]'")


def text_parts(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The text encoders by their names in the pipeline, which are the prefixes of a LoRA's keys."""
    parts = {name: getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")}
    return {name: encoder for name, encoder in parts.items() if encoder is not None}


def adapted_parts(pipeline: DiffusionPipeline) -> list[str]:
    """Those of UNet and text encoders that hold an adapter."""
    parts = {"unet": pipeline.unet, **text_parts(pipeline)}
    return [name for name, network in parts.items() if count_adapted(network)]


def count_adapted(network: nn.Module) -> int:
    """How many modules hold an adapter."""
    return sum(hasattr(module, "lora_A") for module in network.modules())


def has_part(keys: Iterable[str], part: str) -> bool:
    return any(key.startswith(f"{part}.") for key in keys)


def module_of(key: str) -> str:
    """The path of the module that a LoRA weight (`unet.PATH.lora_A.weight`, …) adapts."""
    return key.removeprefix("unet.").split(".lora_")[0]
