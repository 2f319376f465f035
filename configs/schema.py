"""All keys of the configuration files beside this one, with their types."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

import distill.config
import prune.config


@dataclass
class Config(prune.config.Config, distill.config.Config):
    """The keys of every job."""


ConfigStore.instance().store(name="schema", node=Config)
