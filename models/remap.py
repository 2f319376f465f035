"""A LoRA of the full model, rewritten for an export of a pruned one (scripts/remap.py).

A LoRA names blocks by their numbers, and an export numbers its blocks anew: read as it is, the LoRA changes other
blocks than those that it was trained for, without an error. `export_report.json` says where each block went. Keys are
found by the block that they name, as diffusers, PEFT and kohya's programs do it, or the original layouts of Stable
Diffusion 3 and FLUX. What lies outside the blocks stays as it is.

Axes: O outputs of a module, I its inputs, R the rank, times a convolution's kernel.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimstep.engine.quiet import one_line, preview
from slimstep.models.card import read_export_report
from slimstep.models.families.transformer.networks.sd3 import last_text_modulation
from slimstep.models.networks import DENOISERS

ORIGINAL = {  # {class: {what the original layout calls a list of blocks: its name in diffusers}}
    "SD3Transformer2DModel": {"joint_blocks": "transformer_blocks"},
    "FluxTransformer2DModel": {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"},
}
ORIGINAL_UNET = re.compile(r"(input_blocks|output_blocks|middle_block)[._]\d")
STEM = re.compile(r"[._]lora[_.]|\.(alpha$|hada_|lokr_|b?oft_|dora_scale|diff|[wb]_norm)")
DOWN, UP = re.compile(r"[._]lora(_A|[_.]down)\b"), re.compile(r"[._]lora(_B|[_.]up)\b")
PROCESSOR = ".processor."  # in old names of diffusers, which are not those of modules


@dataclass(frozen=True)
class Remapped:
    """What became of a LoRA. modules: how many it changes in the export. gone: {block, or module that the export lacks
    or has narrower: how many modules of the LoRA fall away with it}. lost: their share of the Frobenius norm of all its
    updates; None where these are no products of two matrices."""

    modules: int
    gone: Mapping[str, int]
    lost: float | None


def remap(lora: str | Path, export: str | Path, target: str | Path) -> Remapped:
    """Writes the LoRA for the export as the file `target`, in the kind of names that it has.

    The part of a removed block falls away, and of a narrower module; that of a copied one is there once for each copy.
    Raises ValueError for what
    is no file of safetensors, for an export that does not say where its blocks went, for names that cannot be read, and
    for ControlNets.
    """
    tensors, metadata = stored(lora)
    names = names_of(Path(export))
    if outputs := [key for key in tensors if "controlnet_" in key]:
        why = "diffusers spreads its outputs over the blocks by their number alone, and no file can say otherwise"
        raise ValueError(f"{lora} is a ControlNet ({preview(outputs)}): {why}; train one for the pruned model")
    if other := [key for key in tensors if ORIGINAL_UNET.search(key)]:
        way = "load it by diffusers upon the full model, and save it again"
        raise ValueError(f"{lora} has the names of Stable Diffusion's original files ({preview(other)}): {way}")
    if not any(names.pattern.search(key) for key in tensors):
        raise ValueError(f"{lora} names no block of the model: {preview(tensors)}; those are {preview(names.blocks)}")
    written: dict[str, Tensor] = {}
    fallen: dict[str, str] = {}  # {module of the LoRA: the block or module that is not there}
    narrower = {place.module for key, value in tensors.items() for place in names.places(key)
                if not names.fits(place, names.fitted(place, value))}  # fmt: skip
    for key, value in tensors.items():
        places = names.places(key)
        kept = [place for place in places if names.has(place) and place.module not in narrower]
        written |= {place.key: names.fitted(place, value).clone() for place in kept}
        if not kept:
            fallen[stem_of(key)] = stem_of(key) if places else names.block_of(key)
    save_file(written, target, names.renamed_metadata(metadata))
    norms = squared_norms(tensors)
    total = sum(norms.values())
    lost = (sum(norms[stem] for stem in fallen) / total) ** 0.5 if total and fallen.keys() <= norms.keys() else None
    return Remapped(len({stem_of(key) for key in written}), Counter(fallen.values()), lost)


def stored(lora: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors and metadata."""
    try:
        with safe_open(lora, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{lora} is no file of safetensors: {one_line(error)}") from error


@dataclass(frozen=True)
class Place:
    """A key of the export's LoRA, and the path of its module; None outside the blocks, and in names of other kinds."""

    key: str
    module: str | None = None


@dataclass(frozen=True)
class Names:
    """blocks: {block: its paths in the export}. shapes: {module of the export: its weight's}. aliases: as ORIGINAL."""

    blocks: Mapping[str, Sequence[str]]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]

    def spellings(self, path: str) -> list[str]:
        """A path with dots and with underscores, in diffusers' names and then in original ones."""
        name, dot, rest = path.partition(".")
        lists = [name, *(alias for alias, own in self.aliases.items() if own == name)]
        return [text for alias in lists for text in (f"{alias}{dot}{rest}", f"{alias}{dot}{rest}".replace(".", "_"))]

    @cached_property
    def spelled(self) -> dict[str, tuple[str, int]]:
        """{spelling: its block, and which of the spellings it is}."""
        return {text: (block, kind) for block in self.blocks for kind, text in enumerate(self.spellings(block))}

    @cached_property
    def pattern(self) -> re.Pattern:
        """The block that a key names: of several that begin at one place the longest."""
        longest_first = sorted(self.spelled, key=len, reverse=True)
        return re.compile(rf"({'|'.join(map(re.escape, longest_first))})(?=[._]|$)")

    @cached_property
    def modules(self) -> dict[str, str]:
        """{a module's path with dots, or with underscores: the path}."""
        return {text: path for path in self.shapes for text in (path.replace(".", "_"), path)}

    def block_of(self, key: str) -> str:
        return self.spelled[self.pattern.search(key)[1]][0]

    def places(self, key: str) -> list[Place]:
        """Where a key of the full model's LoRA lies in the export's: in each copy of its block."""
        found = self.pattern.search(key)
        if not found:
            return [Place(key)]
        block, kind = self.spelled[found[1]]
        places = []
        for path in self.blocks[block]:
            moved = key[: found.start()] + self.spellings(path)[kind] + key[found.end() :]
            module = stem_of(moved)[found.start() :]
            is_known = kind < 2 and PROCESSOR not in key
            places.append(Place(moved, self.modules.get(module, module) if is_known else None))
        return places

    def has(self, place: Place) -> bool:
        return place.module is None or place.module in self.shapes

    def fits(self, place: Place, value: Tensor) -> bool:
        """Whether half of a product has as many rows, or columns, as the module: a narrower one has fewer."""
        if place.module not in self.shapes or value.ndim < 2:
            return True
        rows, columns = self.shapes[place.module][:2]
        if UP.search(place.key):
            return len(value) == rows
        return not DOWN.search(place.key) or columns == 1 or value.shape[1] == columns  # 1: of a depthwise convolution

    def fitted(self, place: Place, value: Tensor) -> Tensor:
        """The value as the module takes it: of Stable Diffusion 3's last block, fewer modulations of the text."""
        is_up = place.module is not None and UP.search(place.key)
        if is_up and place.module.endswith("norm1_context.linear") and len(value) > self.shapes[place.module][0]:
            return last_text_modulation(value)
        return value

    def renamed_metadata(self, value: Any) -> Any:
        """PEFT's settings of single modules, by their paths, are JSON within it."""
        if isinstance(value, dict):
            return {place.key: self.renamed_metadata(inner) for key, inner in value.items()
                    for place in self.places(key)}  # fmt: skip
        if isinstance(value, list):
            return [place.key for text in value for place in self.places(text)] if is_texts(value) else value
        with suppress(TypeError, json.JSONDecodeError):  # most of it is other text, or a number
            if isinstance(read := json.loads(value), dict):
                return json.dumps(self.renamed_metadata(read))
        return value


def is_texts(values: list) -> bool:
    return all(isinstance(value, str) for value in values)


def names_of(export: Path) -> Names:
    report = read_export_report(export)
    if not report or not report.get("blocks"):
        reason = "it is no export of a pruned model, or one of an earlier version"
        raise ValueError(f"{export} does not say where the blocks of the full model went: {reason}")
    folder = next(export / part for part in DENOISERS if (export / part).is_dir())
    shapes: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  no mapping
                module, _, kind = name.rpartition(".")
                if kind == "weight":
                    shapes[module] = tuple(weights.get_slice(name).get_shape())
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return Names(report["blocks"], shapes, ORIGINAL.get(kind, {}))


def stem_of(key: str) -> str:
    """A key without what says which part of the module's update it is."""
    found = STEM.search(key)
    return key[: found.start()] if found else key


def squared_norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """{module of the LoRA: ‖α/R · B A‖²}, of those that are such products."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kinds = {"down": DOWN.search(key), "up": UP.search(key), "alpha": key.endswith(".alpha")}
        halves.setdefault(stem_of(key), {}).update({kind: value for kind, fits in kinds.items() if fits})
    norms = {}
    for stem, pair in halves.items():
        if {"down", "up"} <= pair.keys():
            down_RI, up_OR = (pair[kind].double().flatten(1) for kind in ("down", "up"))
            scale = float(pair["alpha"]) / len(down_RI) if "alpha" in pair else 1.0
            norms[stem] = scale**2 * float((up_OR.T @ up_OR * (down_RI @ down_RI.T)).sum())
    return norms
