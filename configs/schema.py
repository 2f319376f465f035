"""All keys of the configuration files beside this one, with their types."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

import slimstep.distill.config
import slimstep.prune.config


@dataclass
class Config(slimstep.prune.config.Config, slimstep.distill.config.Config):
    """The keys of every job."""


ConfigStore.instance().store(name="schema", node=Config)
