"""What a run is about: its models and its data."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

import slimstep.engine.config
from slimstep.engine.checked import CONFIGS
from slimstep.engine.checks import check_choice, check_minimum
from slimstep.engine.resolution import sides

STORAGE_DTYPES = ("float32", "float16")


@dataclass
class CacheConfig:
    """Where encoded images and texts lie, and how: `data/cache.py` tells; `batch_size` counts images."""

    folder: str = "runs/cache"
    batch_size: int = 64
    dtype: str = "float32"
    shard_size: int = 512
    workers: int = 0
    verify: bool = True

    def __post_init__(self) -> None:
        check_minimum("data.cache", self, 1, "batch_size", "shard_size")
        check_minimum("data.cache", self, 0, "workers")
        check_choice("data.cache", self, dtype=STORAGE_DTYPES)


@dataclass
class DataConfig:
    """What every `data` group has; its other keys belong to the constructors of its pairs and prompts.

    resolution: pixels, the side of a square or HEIGHTxWIDTH. Those of videos alone have `frames`, and `first_frames`,
    a folder of images, of which a model makes videos that begins with a frame (null: the first frames of held-out
    videos); where the model reads captions, too, images need some. Of resolution and frames null is the model's own.
    """

    resolution: Any = None
    frames: int | None = None
    first_frames: str | None = None
    prompt_file: str | None = None
    prompt_column: str | None = None
    pairs: Any = None
    prompts: Any = None
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if self.frames is not None:
            check_minimum("data", self, 1, "frames")
        if self.resolution is not None:
            sides(self.resolution)  # ValueError


@dataclass
class Config(slimstep.engine.config.Config):
    """`model` and `models` name pipelines; `data` is a group's own section (DataConfig and what its pairs take)."""

    model: Any = None
    models: Any = None
    data: Any = None

    @staticmethod
    def check(config: DictConfig) -> None:
        check_data(config.data)


@cache
def data_groups() -> list[DictConfig]:
    """What the files of the group say, read once: a workflow checks the configurations of all its stages."""
    return [OmegaConf.load(path) for path in (CONFIGS / "data").glob("*.yaml")]


def check_data(data: DictConfig | None) -> None:
    """ValueError, or Hydra's own, for keys that the group with these pairs has not, and values that cannot be."""
    if data is None:
        raise ValueError(f"data=null: choose one of {', '.join(path.stem for path in (CONFIGS / 'data').iterdir())}")
    kind = "pairs._target_"
    same = (group for group in data_groups() if OmegaConf.select(group, kind) == OmegaConf.select(data, kind))
    known = list(next(same, data))  # pairs of the user's own may have any keys
    if unknown := [key for key in data if key not in known]:
        raise ValueError(f"data has no key {unknown[0]}, which +data.{unknown[0]}=… would add; keys: {', '.join(data)}")
    schema = OmegaConf.create({"data": OmegaConf.structured(DataConfig)})
    requested = {key: value for key, value in OmegaConf.to_container(data, resolve=True).items() if key in schema.data}
    OmegaConf.to_object(OmegaConf.merge(schema, {"data": requested}).data)
