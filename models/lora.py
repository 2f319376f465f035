"""LoRAs made for the stock UNet, fused into a pipeline's weights; of a pruned UNet, as far as they fit."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from slimstep.engine.quiet import one_line, preview, quiet
from slimstep.models.lora_files import path_in, read_lora

log = logging.getLogger("slimstep")
FILES = (".safetensors", ".bin", ".pt", ".ckpt")


@dataclass(frozen=True)
class LoraFit:
    """Module paths that a LoRA adapts: those of the UNet that took it, and those of all networks that are not there.

    texts: how many modules of the text encoders took it.
    """

    applied: tuple[str, ...]
    left_out: tuple[str, ...]
    texts: int = 0


def fuse_lora(pipeline: DiffusionPipeline, source: str | Path | dict[str, Tensor], scale: float = 1.0) -> LoraFit:
    """Add a LoRA (a file, a folder, a hub id or a state dict) to the pipeline's weights, without what was pruned away.

    Raises ValueError where it is for a network and nothing of that fits; for modules of other shapes; and for what
    read_lora cannot read.
    """
    with quiet():
        updates = read_lora(pipeline, source)
    applied: dict[str, list[str]] = {part: [] for part in updates}
    left_out = []
    for part, of_part in updates.items():
        modules = dict(network.named_modules()) if (network := getattr(pipeline, part, None)) is not None else {}
        for path, update in of_part.items():
            if (target := path if part == "unet" or not modules else path_in(network, path)) not in modules:
                left_out.append(path if part == "unet" else f"{part}.{path}")
                continue
            try:
                modules[target].weight.data = update.added_to(modules[target].weight.data, scale)
            except ValueError as error:
                raise ValueError(f"{part}.{target}: {error}") from error
            applied[part].append(target)
    unfit = [part for part, paths in applied.items() if not paths and getattr(pipeline, part, None) is not None]
    if unfit or not any(applied.values()):
        network = unfit[0].replace("unet", "UNet") if unfit else "model"
        raise ValueError(f"it has no weights for this {network}; it adapts {preview(left_out)}")
    texts = sum(len(paths) for part, paths in applied.items() if part != "unet")
    return LoraFit(tuple(sorted(applied.get("unet", ()))), tuple(sorted(left_out)), texts)


def fuse_loras(pipeline: DiffusionPipeline, loras: Sequence[Mapping[str, Any]]) -> None:
    """Add every LoRA, {path, scale}, to the weights of UNet and text encoders, in order.

    Raises ValueError, by `check_loras`, or for one that cannot be read or does not fit.
    """
    for lora in loras:
        path, scale = lora["path"], float(lora.get("scale", 1.0))
        try:
            fit = fuse_lora(pipeline, path, scale)
        except Exception as error:  # diffusers raises whatever a file of another kind makes it stumble over
            raise ValueError(f"model.loras: {path} cannot be fused: {one_line(error)}") from error
        gone = f", {len(fit.left_out)} modules of it are not in this model" if fit.left_out else ""
        log.info(f"LoRA {path} times {scale:g}: fused into {len(fit.applied)} modules of the UNet and "
                 f"{fit.texts} of the text encoders{gone}")  # fmt: skip


def check_loras(loras: Sequence[Any]) -> None:
    """ValueError, before anything is loaded, for entries that are none, or files that are not there."""
    for lora in loras:
        if not isinstance(lora, Mapping) or not {"path"} <= set(lora) <= {"path", "scale"}:
            raise ValueError(f"model.loras={list(loras)} must be a list of tables, as [{{path: FILE, scale: 0.8}}]")
        scale = lora.get("scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < float("inf"):
            raise ValueError(f"model.loras: scale={scale} of {lora['path']} is no number")
        if Path(lora["path"]).suffix in FILES and not Path(lora["path"]).is_file():
            raise ValueError(f"model.loras: {lora['path']} does not exist")
