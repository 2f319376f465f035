"""LoRA files as programs write them, read as low-rank updates of modules.

Names are those of diffusers (new and old), of PEFT (also its folders with `adapter_config.json`, and what
`save_lora_weights` makes of a `PeftModel`, as in diffusers' LCM-LoRA script) and of kohya's and OneTrainer's programs.

Axes: O outputs of a module, I its inputs, R the rank, times a convolution's kernel.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from torch import Tensor, nn

from slimstep.engine.quiet import one_line, preview

log = logging.getLogger("slimstep")
PARTS = ("unet", "text_encoder", "text_encoder_2")
KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
PEFT_PREFIX, PEFT_CONFIG, EMBEDDING = "base_model.model.", "adapter_config.json", "bundle_emb."
USUAL = [f"{name}.{ending}" for ending in ("safetensors", "bin") for name in ("pytorch_lora_weights", "adapter_model")]
PLAIN = dict.fromkeys(("weight_name", "local_files_only", "cache_dir", "force_download", "proxies", "token", "revision",
                       "subfolder", "user_agent"))  # fmt: skip
KINDS = {
    r"\.dora_scale$": "a DoRA of kohya's or LyCORIS' kind, whose file leaves open over which axis its norms are",
    r"\.hada_": "a LoHa", r"\.lokr_": "a LoKr", r"\.b?oft_": "an OFT", r"\.lora_mid\.": "a LoCon with a Tucker core",
    r"\.(diff|diff_b|w_norm|b_norm)$": "a full difference of weights", r"\.(on_input|ia3_l)": "an IA3",
    r"\.[ab][12]\.weight$": "a GLoRA", r"\.vera_": "a VeRA", r"\.lora_embedding_[AB]": "a LoRA of an embedding",
    r"\.lora_B(\.\w+)?\.bias$": "a LoRA with biases",
}  # fmt: skip
WEIGHT = re.compile(rf"({'|'.join(PARTS)})\.(.+)\.(?:lora_(A|B|magnitude_vector)(?:(?:\.\w+)?\.weight)?|(alpha))")
SUFFIXES = {".lora_down.": ".lora_A.", ".lora_up.": ".lora_B.", ".lora.down.": ".lora_A.", ".lora.up.": ".lora_B."}
OF_UNET = re.compile(r"(conv_in|conv_out|(time|add|class)_embedding|(down|up)_blocks|mid_block|encoder_hid_proj)\.")
OTHER_BASES = ("pissa", "olora", "corda", "loftq")  # ways of PEFT to begin that change the weights beneath, too


@dataclass(frozen=True)
class LowRank:
    """W becomes W + scale · B A; with magnitudes m, as a DoRA has them, m times the rows of that, made unit vectors.

    down: A [R, I]. up: B [O, R], α/r within. magnitude: m [O] (Liu et al. 2024, equation 5).
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None

    def added_to(self, weight: Tensor, scale: float) -> Tensor:
        """The new weight, computed in float32, in the weight's dtype. ValueError for another shape, and for NaNs."""
        if not self.fits(weight):
            shapes = f"{tuple(self.up.shape)} times {tuple(self.down.shape)}"
            raise ValueError(f"its weights are {tuple(weight.shape)}, the LoRA's {shapes}: it is for another model")
        sum_OI = weight.float().flatten(1) + scale * self.up.float().flatten(1) @ self.down.float().flatten(1)
        if self.magnitude is not None:
            sum_OI *= self.magnitude.float().view(-1, 1) / sum_OI.norm(dim=1, keepdim=True)
        if not sum_OI.isfinite().all():
            raise ValueError("the sum of its weights and the LoRA's is not finite")
        return sum_OI.view_as(weight).to(weight.dtype)

    def fits(self, weight: Tensor) -> bool:
        """Also that of a linear layer a convolution of 1×1, and the other way round."""
        down, up = self.down.flatten(1), self.up.flatten(1)
        return (len(up), down.shape[1]) == weight.flatten(1).shape and up.shape[1] == len(down)


def read_lora(pipeline: DiffusionPipeline, source: str | Path | dict[str, Tensor]) -> dict[str, dict[str, LowRank]]:
    """{part: {path of a module: its update}} of a file, a folder, a hub id or a state dict; parts are PARTS.

    Alphas are those of tensors; else of the metadata or of PEFT's configuration; else the ranks, as in diffusers.
    Embeddings beside the LoRA are left out, with a line of the log.
    Raises ValueError for what is no LoRA, or one of another kind (KINDS).
    """
    places = part_folders(source) or {None: source}
    read = {part: stored_in(place) for part, place in places.items()}
    updates = {}
    for part, (stored, config) in read.items():
        stored = without_embeddings(stored)
        check_kind(stored, config)
        is_kohya = bool(stored) and all(key.startswith(KOHYA) for key in stored)
        weights = kohya_named(pipeline, stored) if is_kohya else diffusers_named(pipeline, stored, part)
        has_alphas = any(key.endswith(".alpha") for key in stored)
        updates |= updates_of(weights, {} if has_alphas else config)
    return updates


def part_folders(source: str | Path | dict[str, Tensor]) -> dict[str, Path]:
    """{part: its folder} where PEFT's adapters lie in one folder for each network; else nothing."""
    if isinstance(source, dict):
        return {}
    return {part: Path(source) / part for part in PARTS if (Path(source) / part / PEFT_CONFIG).is_file()}


def stored_in(source: str | Path | dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors, and what is said of them: by the file's metadata, or by PEFT's configuration in the same folder."""
    if not isinstance(source, dict) and Path(source).is_dir():
        source = file_in(Path(source))
    stored, metadata = _fetch_state_dict(source, use_safetensors=True, allow_pickle=True, **PLAIN)
    if not isinstance(source, dict) and any(key.startswith(PEFT_PREFIX) for key in stored):
        metadata = peft_config(Path(source).with_name(PEFT_CONFIG))
    return dict(stored), metadata or {}


def file_in(folder: Path) -> Path:
    """The file of weights in a folder. ValueError where there is none, or several without a usual name."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt"))
    usual = [path for name in USUAL for path in files if path.name == name]
    if not usual and len(files) != 1:
        raise ValueError(f"it holds {preview(path.name for path in files) or 'no file of weights'}: name the one file")
    return (usual or files)[0]


def peft_config(file: Path) -> dict[str, Any]:
    """Raises ValueError where it is not there: nothing else tells alpha."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        message = f"it is PEFT's, and {file}, which tells its alpha, cannot be read"
        raise ValueError(f"{message}: {one_line(error)}") from error


def without_embeddings(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without OneTrainer's `bundle_emb.TOKEN.…`: new tokens are no update of weights."""
    tokens = sorted({key.split(".")[1] for key in stored if key.startswith(EMBEDDING)})
    if tokens:
        log.warning(f"LoRA: its embeddings of {preview(tokens)} are left out; in prompts these are plain words")
    return {key: value for key, value in stored.items() if not key.startswith(EMBEDDING)}


def check_kind(stored: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """ValueError, in one short line, for an adapter that is no LoRA, or one upon other weights than the model's."""
    if (kind := config.get("peft_type") or "LORA") != "LORA":
        raise ValueError(f"it is PEFT's {kind}; only LoRAs are supported")
    if str(start := config.get("init_lora_weights")).lower().startswith(OTHER_BASES):
        raise ValueError(f"it began as {start}, upon weights that are not the model's: save it by PEFT as a plain LoRA")
    for pattern, kind in KINDS.items():
        if key := next((key for key in stored if re.search(pattern, key)), None):
            raise ValueError(f"it is {kind} ({preview([key])}); only LoRAs, and DoRAs in PEFT's names, are supported")


def kohya_named(pipeline: DiffusionPipeline, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kohya's weights in the names of WEIGHT, α/r in B: diffusers does not find modules of alphas unlike the most."""
    bare = {key.replace("_base_model_model_", "_"): value for key, value in stored.items()}
    try:
        weights, alphas = pipeline.lora_state_dict(bare, unet_config=pipeline.unet.config)
    except KeyError as error:
        raise ValueError(f"it lacks {error.args[0]}, the other half of a pair") from error
    for key in [key for key in weights if key.endswith(".down.weight")]:
        alpha = (alphas or {}).get(f"{key.split('.lora.')[0]}.alpha")  # as diffusers names it
        if alpha is not None:
            up = key.replace(".down.weight", ".up.weight")
            weights[up] = weights[up].float() * (alpha / len(weights[key]))
    return peft_named(weights)


def diffusers_named(pipeline: DiffusionPipeline, stored: Mapping[str, Tensor], part: str | None) -> dict[str, Tensor]:
    """All others' weights in the names of WEIGHT. part: that of all keys, None where they say it, or their paths do."""
    bare = {key.replace(PEFT_PREFIX, "", 1): value for key, value in stored.items()}
    parts = tuple(f"{name}." for name in PARTS)
    of_parts = {key: value for key, value in bare.items() if part is None and key.startswith(parts)}
    rest = {key: value for key, value in bare.items() if key not in of_parts}
    if rest:
        part = part or part_of(pipeline, rest)
        of_parts |= {f"{part}.{key}": value for key, value in rest.items()}
    return peft_named(of_parts)


def peft_named(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every key by itself: files mix names of several kinds."""
    unet = {key: value for key, value in weights.items() if key.startswith("unet.")}
    texts = {key: value for key, value in weights.items() if key not in unet}
    texts = convert_state_dict_to_diffusers(texts, StateDictType.DIFFUSERS_OLD)
    texts = convert_state_dict_to_peft(texts, StateDictType.DIFFUSERS)
    named = {**convert_unet_state_dict_to_peft(unet), **texts}
    for old, new in SUFFIXES.items():
        named = {key.replace(old, new): value for key, value in named.items()}
    return named


def part_of(pipeline: DiffusionPipeline, weights: Mapping[str, Tensor]) -> str:
    """The network for which weights without its name are, by their paths and, of two text encoders, by their shapes."""
    if any(OF_UNET.match(key) for key in weights):
        return "unet"
    if not any("lora" in key for key in weights):
        raise ValueError(f"it is no LoRA that can be read: it holds {preview(weights)}")
    fitting = []
    for part in PARTS[1:]:
        if (network := getattr(pipeline, part, None)) is not None:
            updates = updates_of(peft_named({f"{part}.{key}": value for key, value in weights.items()}), {})[part]
            if any(fits_in(network, path, update) for path, update in updates.items()):
                fitting.append(part)
    if len(fitting) != 1:
        way = f"begin its names with one of {preview(fitting or PARTS)}, or put PEFT's folder into one of that name"
        raise ValueError(f"it does not say for which network it is ({preview(weights)}): {way}")
    return fitting[0]


def fits_in(network: nn.Module, path: str, update: LowRank) -> bool:
    module = dict(network.named_modules()).get(path_in(network, path))
    return module is not None and update.fits(module.weight)


def path_in(network: nn.Module, path: str) -> str:
    """The path as a text encoder has it, with or without `text_model.`; unchanged where it has neither."""
    names = {name for name, _ in network.named_modules()}
    spellings = path, path.removeprefix("text_model."), f"text_model.{path}"
    return next((name for name in spellings if name in names), path)


def updates_of(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, dict[str, LowRank]]:
    """{part: {path: update}}. ValueError for weights that are none of a LoRA, or half of a pair."""
    layers: dict[tuple[str, str], dict[str, Tensor]] = {}
    unread = []
    for key, value in weights.items():
        if match := WEIGHT.fullmatch(key):
            layers.setdefault((match[1], match[2]), {})[match[3] or match[4]] = value
        else:
            unread.append(key)
    unread += [f"{part}.{path}" for (part, path), pair in layers.items() if not {"A", "B"} <= pair.keys()]
    if unread or not layers:
        reason = f"{len(unread)} weights make no pairs: {preview(unread)}" if unread else "it is empty"
        raise ValueError(f"it is no LoRA that can be read: {reason}")
    updates: dict[str, dict[str, LowRank]] = {}
    for (part, path), pair in layers.items():
        rank = len(pair["A"])
        factor = float(pair["alpha"]) / rank if "alpha" in pair else stored_factor(of_part(config, part), path, rank)
        update = LowRank(pair["A"], pair["B"].float() * factor, pair.get("magnitude_vector"))
        updates.setdefault(part, {})[path] = update
    return updates


def of_part(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What a configuration says of one part: its fields have the part's name before them, or no part's."""
    if any(key.startswith(tuple(f"{name}." for name in PARTS)) for key in config):
        return {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
    return dict(config)


def stored_factor(config: Mapping[str, Any], path: str, rank: int) -> float:
    """α/r of a module, or α/√r (rsLoRA), by PEFT's fields; 1 where there are none."""
    if "lora_alpha" not in config:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    matches = [alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", path)]
    return (matches or [config["lora_alpha"]])[0] / (rank**0.5 if config.get("use_rslora") else rank)
