"""The configuration of a run in its checked form, and the directory that belongs to it."""

import os
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from yaml import YAMLError

from slimstep import ROOT
from slimstep.engine.checks import check_minimum
from slimstep.engine.config import Config, schema
from slimstep.engine.names import check_name, disk_name
from slimstep.engine.renamed import replace_moved, tell, with_new_names

CONFIGS = ROOT / "configs"
USER_ERRORS = (
    ValueError, OSError, FloatingPointError, SafetensorError, YAMLError, HydraException, OmegaConfBaseException,
)  # fmt: skip
PRECISIONS = ("no", "bf16", "fp16")


def checked_config(config: DictConfig) -> DictConfig:
    """The configuration in its typed form. ValueError for keys nobody reads, and values that cannot be."""
    config = OmegaConf.create(with_new_names(OmegaConf.to_container(config, resolve=False), tell))
    known = schema()
    if unknown := list(unknown_keys(known, config)):
        raise ValueError(f"the configuration has no key {unknown[0]}, which +{unknown[0]}=… would add")
    config = cast(DictConfig, OmegaConf.merge(known, config))
    replace_moved(config)
    check_given(config)
    for section in config:
        if OmegaConf.is_config(config[section]):
            OmegaConf.to_container(config[section], structured_config_mode=SCMode.INSTANTIATE)  # the typed ones check
    if config.job is not None:
        config.stages = None  # a budget has values for workflows, too
    check_minimum("the configuration", config, 0, "threads")
    if config.threads > (cores := os.cpu_count() or 1):
        raise ValueError(f"threads={config.threads}, but there are {cores} cores; 0 leaves the choice to torch")
    if config.mixed_precision not in PRECISIONS:
        source = " (accelerate's launcher gives it)" if OmegaConf.is_interpolation(config, "mixed_precision") else ""
        raise ValueError(f"mixed_precision={config.mixed_precision!r} is unknown{source}; choose from {PRECISIONS}")
    if config.mixed_precision == "fp16" and not has_gpu():
        raise ValueError("mixed_precision=fp16 needs a GPU, and there is none; choose bf16, or no for float32")
    cast(type[Config], OmegaConf.get_type(config)).check(config)
    run_path(config)
    return config


def check_given(config: DictConfig) -> None:
    """ValueError for a key without a value that has to have one, with what its file says of it."""
    for key in missing(OmegaConf.to_container(config, resolve=False, structured_config_mode=SCMode.DICT)):
        leaf = key.rpartition(".")[2]
        groups = (key.split(".")[0], "metric", "preference")
        for file in sorted(path for group in groups for path in CONFIGS.glob(f"{group}/*.yaml")):
            line = re.search(rf"^{leaf}: \?\?\?[ \t]*(# (.*))?$", file.read_text(), re.MULTILINE)
            if line and describes(file, config, key):
                way = line[2] or file.read_text().partition("\n")[0].removeprefix("# ")
                raise ValueError(f"{key} is not given: {key}=… ({way})")
        raise ValueError(f"{key} is not given: {key}=…")


def describes(file: Path, config: DictConfig, key: str) -> bool:
    """Whether a group's file is the one that the section of `key` is made by."""
    section, content = OmegaConf.select(config, key.rpartition(".")[0]), OmegaConf.load(file)
    for kind in ("_target_", "pairs._target_"):
        if target := OmegaConf.select(content, kind):
            return target == OmegaConf.select(section, kind)
    return False


def missing(value: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all values that are still to be given."""
    if value == "???":
        yield prefix
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from missing(inner, f"{prefix}.{key}" if prefix else str(key))


def has_gpu() -> bool:
    import torch  # here, since only this question needs it before the job is known

    return torch.cuda.is_available()


def unknown_keys(schema: DictConfig, config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Keys that a `+` added to the typed part of the configuration, where nothing would read them."""
    for key in map(str, config):
        if key not in schema:
            yield f"{prefix}{key}"
        elif is_dataclass(OmegaConf.get_type(schema, key)):
            yield from unknown_keys(schema[key], config[key], f"{prefix}{key}.")


def run_path(config: DictConfig) -> Path:
    """root/name; under a multirun `root/name/<the swept overrides>`, or their beginning and hash where they are long.

    ValueError for a name that leaves root, and for one that no folder can have.
    """
    parts = Path(config.name).parts
    if not parts or Path(config.name).is_absolute() or ".." in parts:
        raise ValueError(f"name={config.name!r} must name a folder under root")
    check_name(config.name, "name")
    path = Path(config.root) / config.name
    swept = disk_name(HydraConfig.get().job.override_dirname)
    if HydraConfig.get().mode != RunMode.MULTIRUN or swept in Path(config.root).parts:  # a stage's is
        return path
    return path / swept
