"""Experiments, keys, jobs and components of earlier versions' configurations, and what they are called now."""

import logging
import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

log = logging.getLogger("slimstep")
EXPERIMENTS = {"handover": "export_student", "ladder": "cumulative"}
KEYS = {
    "benchmark.first_image": "benchmark.cold_start",
    "handover": "export",
    "search.bypass": "search.skip_rule",
    "search.method.depths": "search.method.architecture",
    "search.method.sites": "search.method.blocks",
}
OLD_EXPERIMENT = re.compile(rf"(\+experiment=|restart=|[+~]*stages\.)({'|'.join(EXPERIMENTS)})(?=[.=]|$)")
OLD_STAGE = re.compile(rf"(?<![^/])({'|'.join(EXPERIMENTS)})(?=/export|$)")  # a folder of a workflow, or its name alone
OLD_KEY = re.compile(rf"([+~]*(?:stages\.[^.=]+\.)?)({'|'.join(map(re.escape, KEYS))})(?=[.=]|$)")

MOVED = {
    "slimstep.engine.handover.hand_over": "slimstep.eval.export_job.export_student",
    "slimstep.eval.clip.ClipScorer": "slimstep.eval.metrics.clip.ClipScorer",
    "slimstep.eval.handover.hand_over": "slimstep.eval.export_job.export_student",
    "slimstep.eval.speed_job.ladder": "slimstep.eval.speed_job.cumulative",
    "slimstep.eval.preference.PickScore": "slimstep.eval.metrics.preference.PickScore",
}
BARE = re.compile(r"(data|distill|engine|eval|models|prune)\.\w+(\.\w+)+")  # paths from before the one import root
# What earlier versions did without saying it.
ADDED = {"evaluation.preferences.hpsv2.quick_gelu": False, "search.metric": "clip"}


def with_new_key(word: str) -> str:
    """An override of the command line with the present name of its experiment and its key; a line says so where one is
    another."""
    if match := OLD_EXPERIMENT.match(word):
        tell(match[2], EXPERIMENTS[match[2]])
        word = f"{match[1]}{EXPERIMENTS[match[2]]}{word[match.end() :]}"
    if not (match := OLD_KEY.match(word)):
        return word
    tell(match[2], KEYS[match[2]])
    return f"{match[1]}{KEYS[match[2]]}{word[match.end() :]}"


def rename_keys(config: DictConfig) -> None:
    """Moves the values of old keys of a configuration to where they are read; a line for each."""
    for key, new in KEYS.items():
        if (value := OmegaConf.select(config, key)) is not None:
            tell(key, new)
            parent, _, leaf = key.rpartition(".")
            with open_dict(config):
                OmegaConf.update(config, new, value)
                del (OmegaConf.select(config, parent) if parent else config)[leaf]


def with_new_keys(table: Any, prefix: str = "") -> Any:
    """The configuration that an earlier version wrote, with the keys as they are called now."""
    if not isinstance(table, dict):
        return table
    return {
        KEYS[f"{prefix}{key}"].removeprefix(prefix) if f"{prefix}{key}" in KEYS else key:
        with_new_keys(value, f"{prefix}{key}.") for key, value in table.items()
    }  # fmt: skip


def tell(old: str, new: str) -> None:
    log.warning(f"{old} is called {new} now; the old name works for one version")


def with_new_kind(results: dict[str, Any]) -> dict[str, Any]:
    """The results.json of a timed run, its kind as it is called now."""
    return {**results, "kind": EXPERIMENTS.get(results["kind"], results["kind"])} if "kind" in results else results


def at_their_place(value: Any) -> Any:
    """A nested value with every moved path replaced, and stages called as they are now."""
    if isinstance(value, dict):
        return {key: at_their_place(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [at_their_place(inner) for inner in value]
    if not isinstance(value, str):
        return value
    path = f"slimstep.{value}" if BARE.fullmatch(value) else OLD_STAGE.sub(lambda old: EXPERIMENTS[old[0]], value)
    return MOVED.get(path, path)


def with_new_products(record: dict[str, Any]) -> dict[str, Any]:
    """{product: what is known of it}, where the products' first folders are stages, called as they are now."""
    return {at_their_place(product): value for product, value in record.items()}


def replace_moved(config: DictConfig | ListConfig) -> None:
    """Points `job` and every `_target_` of a configuration to where it lies now."""
    keys: Iterable[Any] = range(len(config)) if OmegaConf.is_list(config) else config
    for key in keys:
        if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key):
            continue
        if OmegaConf.is_config(config[key]):
            replace_moved(config[key])
        elif key in ("job", "_target_"):
            config[key] = at_their_place(config[key])


def is_same(key: str, old: Any, new: Any) -> bool:
    """Whether a value of an earlier version's configuration, None where it had no such key, is what is there now."""
    return at_their_place(old) == at_their_place(new) or (old is None and key in ADDED and ADDED[key] == new)
