"""Jobs and components of earlier versions' configurations, and where they lie now."""

import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

MOVED = {
    "engine.handover.hand_over": "slimstep.eval.handover.hand_over",
    "eval.clip.ClipScorer": "slimstep.eval.metrics.clip.ClipScorer",
    "eval.preference.PickScore": "slimstep.eval.metrics.preference.PickScore",
}
BARE = re.compile(r"(data|distill|engine|eval|models|prune)\.\w+(\.\w+)+")  # paths from before the one import root
ADDED = {"evaluation.preferences.hpsv2.quick_gelu": False}  # what earlier versions did without saying it


def at_their_place(value: Any) -> Any:
    """A nested value with every moved path replaced."""
    if isinstance(value, dict):
        return {key: at_their_place(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [at_their_place(inner) for inner in value]
    if not isinstance(value, str):
        return value
    return MOVED.get(value) or (f"slimstep.{value}" if BARE.fullmatch(value) else value)


def replace_moved(config: DictConfig | ListConfig) -> None:
    """Points `job` and every `_target_` of a configuration to where it lies now."""
    for key in range(len(config)) if OmegaConf.is_list(config) else config:
        if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key):
            continue
        if OmegaConf.is_config(config[key]):
            replace_moved(config[key])
        elif key in ("job", "_target_"):
            config[key] = at_their_place(config[key])


def is_same(key: str, old: Any, new: Any) -> bool:
    """Whether a value of an earlier version's configuration, None where it had no such key, is what is there now."""
    return at_their_place(old) == at_their_place(new) or (old is None and key in ADDED and ADDED[key] == new)
