"""Experiments, keys, values, jobs and components of earlier versions' configurations, and what they are called now."""

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

log = logging.getLogger("slimstep")
EXPERIMENTS = {"handover": "export_student", "ladder": "cumulative"}
KEYS = {
    "benchmark.first_image": "benchmark.cold_start",
    "decoder.choice": "decoder.importance",
    "evaluation.ranked_on": "evaluation.calibration_prompts",
    "handover": "export",
    "ladder": "distillation",
    "ladder.guidance_width": "distillation.guidance_embed_dim",
    "ladder.repair": "distillation.recover",
    "ladder.rungs": "distillation.stages",
    "search.bypass": "search.skip_rule",
    "search.method.depths": "search.method.architecture",
    "search.method.sites": "search.method.blocks",
    "velocity": "v_prediction",
}
OLD_EXPERIMENT = re.compile(rf"(\+experiment=|restart=|[+~]*stages\.)({'|'.join(EXPERIMENTS)})(?=[.=]|$)")
OLD_STAGE = re.compile(rf"(?<![^/])({'|'.join(EXPERIMENTS)})(?=/export|$)")  # a folder of a workflow, or its name alone
VALUES = {
    "decoder.importance": {"energy": "activation_energy"},
    "decoder.norm_groups": {"thinned": "per_group"},
    "objective": {"robust": "stochastic_depth"},
}
OLD = "|".join(map(re.escape, sorted(KEYS, key=len, reverse=True)))
OLD_KEY = re.compile(rf"([+~]*)((?:stages\.[^.=]+\.)?)({OLD})(?=[.=]|$)")
OLD_REFERENCE = re.compile(rf"(\$\{{(?:stages\.[^.:}}]+\.)?)({OLD})(?=[.}}])")  # an interpolation
OLD_VALUE = re.compile(rf"((?:\+*stages\.[^.=]+\.)?)({'|'.join(map(re.escape, VALUES))})=([\w,]+)")

MOVED = {
    "slimstep.engine.handover.hand_over": "slimstep.eval.export_job.export_student",
    "slimstep.eval.clip.ClipScorer": "slimstep.eval.metrics.clip.ClipScorer",
    "slimstep.eval.handover.hand_over": "slimstep.eval.export_job.export_student",
    "slimstep.eval.speed_job.ladder": "slimstep.eval.speed_job.cumulative",
    "slimstep.eval.preference.PickScore": "slimstep.eval.metrics.preference.PickScore",
    "slimstep.prune.robust.RobustTraining": "slimstep.prune.stochastic_depth.StochasticDepth",
}
BARE = re.compile(r"(data|distill|engine|eval|models|prune)\.\w+(\.\w+)+")  # paths from before the one import root
# What earlier versions did without saying it.
ADDED = {
    "evaluation.preferences.hpsv2.quick_gelu": False, "search.metric": "clip", "search.blocks": "whole",
    "search.actions": ["remove", "copy"], "search.widths": [0.75, 0.5, 0.25], "search.keep": [],
    "search.dtypes": ["int8"], "search.merge": [0.25, 0.5],
    "search.interactions": 0, "search.interactions_by": "screen",
    "evaluation.diversity_prompts": 0, "evaluation.diversity_seeds": 8,
    "scoring.screen_margin": 2.0, "scoring.race_prompts": 16, "scoring.tolerance": 0.1, "distillation.shift": None,
    "distillation.quantize": None,
    "scoring.recovery_steps": 0, "scoring.recovery_learning_rate": 1e-4,
    "package.formats": ["onnx", "aoti"], "package.steps": [], "package.batch": 1,
    "package.sizes": [], "package.weights": "inside",
    "model.timestep_spacing": None, "model.trained_steps": None, "recovery.objective.denoising_weight": 1.0,
    "model.first_stage": None, "model.video": None, "data.first_frames": None, "decoder.frames": None,
    "model.vae_tiling": False, "objective.temporal": 0.0,
    "objective.skip_prob.transformer": 0.1, "objective.skip_prob.sublayer": 0.1,
    **{f"{stage}train.{key}": value for stage in ("", "recovery.", "v_prediction.")
       for key, value in (("lora_rank", 0), ("evaluate_every", 0), ("keep_best", False))},
}  # fmt: skip


def with_new_key(override: str) -> str:
    """An override of the command line with its experiment, key and value as they are called now; a line says so where
    that is another name. A whole section of old keys is added as it is, for `with_new_names`."""
    if match := OLD_EXPERIMENT.match(override):
        tell(match[2], EXPERIMENTS[match[2]])
        override = f"{match[1]}{EXPERIMENTS[match[2]]}{override[match.end() :]}"
    if match := OLD_KEY.match(override):
        signs, stage, key = match.groups()
        if "." not in key and override[match.end() :].startswith("="):
            return override if signs else f"++{override}"
        rest = override[match.end() :]
        below = rest.partition("=")[0]
        tell(f"{key}{below}", f"{KEYS[key]}{below}")
        override = f"{signs}{stage}{KEYS[key]}{rest}"
    if match := OLD_VALUE.fullmatch(override):
        stage, key, values = match.groups()
        new = ",".join(VALUES[key].get(value, value) for value in values.split(","))
        if new != values:
            tell(f"{key}={values}", f"{key}={new}")
        override = f"{stage}{key}={new}"
    return override


def tell(old: str, new: str) -> None:
    log.warning(f"{old} is called {new} now; the old name works for one version")


def with_new_names(value: Any, say: Callable[[str, str], None] = lambda old, new: None, prefix: str = "") -> Any:
    """A nested configuration of an earlier version, or its tables of stages, with keys and values as they are called
    now; `say` hears of each. Where a key stands under both names the values of the old one are put over the other's."""
    if prefix.startswith("stages.") and prefix.count(".") == 1:
        prefix = ""  # a stage's table is a configuration, too
    if isinstance(value, str) and "${" in value:
        return OLD_REFERENCE.sub(lambda found: f"{found[1]}{KEYS[found[2]]}", value)
    if isinstance(value, str):
        key = KEYS.get(prefix, prefix)
        if (new := VALUES.get(key, {}).get(value, value)) != value:
            say(f"{key}={value}", f"{key}={new}")
        return new
    if isinstance(value, list):
        return [with_new_names(inner, say, f"{prefix}[]") for inner in value]
    if not isinstance(value, dict):
        return value
    renamed: dict[str, Any] = {}
    paths = {key: f"{prefix}.{key}" if prefix else str(key) for key in value}
    for key in sorted(value, key=lambda key: paths[key] in KEYS):  # old ones last, to win
        inner, path = with_new_names(value[key], say, paths[key]), paths[key]
        if path in KEYS:
            say(path, KEYS[path])
        name = KEYS[path].rpartition(".")[2] if path in KEYS else key
        renamed[name] = merged(renamed[name], inner) if name in renamed else inner
    return renamed


def merged(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: merged(below[key], value) if key in below else value for key, value in above.items()}}


def with_new_kind(results: dict[str, Any]) -> dict[str, Any]:
    """The results.json of a timed run, its kind as it is called now."""
    return {**results, "kind": EXPERIMENTS.get(results["kind"], results["kind"])} if "kind" in results else results


def map_texts(value: Any, change: Callable[[str], Any]) -> Any:
    """Nested tables and lists with every text changed; keys stay."""
    if isinstance(value, dict):
        return {key: map_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [map_texts(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def at_its_place(text: str) -> str:
    """A path that has moved where it lies now, a stage as it is called now; any other text as it is."""
    path = f"slimstep.{text}" if BARE.fullmatch(text) else OLD_STAGE.sub(lambda old: EXPERIMENTS[old[0]], text)
    return MOVED.get(path, path)


def with_new_artifacts(record: dict[str, Any]) -> dict[str, Any]:
    """{artifact: what is known of it}, where the artifacts' first folders are stages, called as they are now."""
    return {at_its_place(artifact): value for artifact, value in record.items()}


def replace_moved(config: DictConfig | ListConfig) -> None:
    """Points `job` and every `_target_` of a configuration to where it lies now."""
    keys: Iterable[Any] = range(len(config)) if OmegaConf.is_list(config) else config
    for key in keys:
        if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key):
            continue
        if OmegaConf.is_config(config[key]):
            replace_moved(config[key])
        elif key in ("job", "_target_"):
            config[key] = map_texts(config[key], at_its_place)


def is_same(key: str, old: Any, new: Any) -> bool:
    """Whether a value of an earlier version's configuration, None where it had no such key, is what is there now."""
    there, now = (map_texts(value, at_its_place) for value in (old, new))
    return there == now or (old is None and key in ADDED and ADDED[key] == new)
