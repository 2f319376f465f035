"""The overrides of a stage's command: what its table changes, and which overrides of the workflow apply to it."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from slimstep import ROOT

CONFIGS = ROOT / "configs"
OF_THE_WORKFLOW = ("name", "root", "experiment", "restart", "stages", "plan")
PLAIN = re.compile(r"[A-Za-z_/.][\w./-]*", re.ASCII)
SPECIAL = ("true", "false", "null", "nan", "inf")
WORD = re.compile(r"(?P<key>[+~]*[A-Za-z_][\w./@:$-]*)=(?P<value>.*)", re.DOTALL | re.ASCII)
# Tables, lists, quoted texts and Hydra's own functions: what cannot be read of these was not meant as plain text.
FUNCTIONS = "bool choice extend_list float glob int interval json_str range shuffle sort str tag".replace(" ", "|")
STRUCTURED = re.compile(rf"\s*([{{'\"]|\[(?!\w*\][^,\[\]]+$)|({FUNCTIONS})\()")


def compose(overrides: tuple[str, ...], **options: Any) -> DictConfig:
    """The configuration that these overrides make."""
    if GlobalHydra.instance().is_initialized():
        return hydra.compose("train", overrides=list(overrides), **options)
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("train", overrides=list(overrides), **options)


@cache
def experiment(name: str) -> DictConfig:
    """The configuration of an experiment as it is, and Hydra's own beside it."""
    return compose((f"+experiment={name}",), return_hydra_config=True)


def stage_overrides(name: str, table: Mapping[str, Any]) -> tuple[str, ...]:
    """+experiment=NAME and its overrides: the workflow's table, the command line's for all stages, and for this one.

    A group that the workflow chooses (`data=…`, `budget=…`) applies to the stages that have it.
    """
    base = experiment(name)
    of_table = dict(flat(table, base))
    requested = [parsed(override) for override in HydraConfig.get().overrides.task]
    general = [as_typed(override) for override in requested if goes_to_all(override, base.hydra.runtime.choices)]
    of_stage = {override.key_or_group.removeprefix(f"stages.{name}."): override.value() for override in requested
           if override.key_or_group.startswith(f"stages.{name}.")}  # fmt: skip
    # A group's choice is gone from the table where another override is about a key in it.
    chosen = {key: hydra_value(value) for key, value in of_stage.items() if (CONFIGS / key).is_dir()}
    said_of_it = [key for key in of_table if any(f"{key}.".startswith(f"{mine}.") for mine in of_stage)]
    before = {key: value for key, value in of_table.items() if key not in said_of_it}
    after = chosen | {key: of_table[key] for key in said_of_it}
    overrides = (f"{key}={value}" for key, value in before.items()), general, (f"{k}={v}" for k, v in after.items())
    return (f"+experiment={name}", *(override for part in overrides for override in part))


def goes_to_all(override: Override, choices: Mapping[str, Any]) -> bool:
    """Whether an override of the workflow's command is one of the stage's with these groups."""
    key = override.key_or_group
    if key.split(".")[0] in OF_THE_WORKFLOW:
        return False
    return override.is_add() or not (CONFIGS / key).is_dir() or key in choices


def flat(table: Mapping[str, Any], base: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as Hydra reads it); a table goes key by key where `base` has one, and whole where not."""
    for key, value in table.items():
        existing = base.get(key) if OmegaConf.is_dict(base) else None
        if isinstance(value, Mapping) and OmegaConf.is_dict(existing):
            yield from flat(value, existing, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", hydra_value(value)


def hydra_value(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {hydra_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(hydra_value, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, str) or (PLAIN.fullmatch(value) and value.lower() not in SPECIAL):
        return str(value)
    # A backslash is itself, but before a quote.
    return "'" + re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), value) + "'"


def quoted(override: str, sweeps: bool = False) -> str:
    """The override with quotes around its value where that is plain text which Hydra's grammar has no place for, as in
    data.root=/photos/a=b (1); as it is where Hydra reads it, or where a table or a sweep may be meant."""
    match = WORD.fullmatch(override)
    if match is None or is_readable(override) or STRUCTURED.match(match["value"]) or (sweeps and "," in match["value"]):
        return override
    return f"{match['key']}={hydra_value(match['value'])}"


def is_readable(override: str) -> bool:
    """Whether Hydra's grammar has a place for this."""
    try:
        parsed(override)
    except HydraException:
        return False
    return True


@cache
def parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def as_typed(override: Override) -> str:
    """The override as it stood on the command line."""
    assert override.input_line is not None, f"{override} was not parsed"
    return override.input_line


def strings(value: Any) -> Iterator[str]:
    """Every text in nested tables and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)
