"""Runs the stages of a recipe of the shapes' models: all of them, or the one that its configuration names."""

from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig

from slimstep.engine.checked import USER_ERRORS
from slimstep.engine.launch import fail
from slimstep.engine.quiet import one_line


def run_stages(config: DictConfig, stages: Sequence[str], recipe: Callable[[DictConfig], Any]) -> None:
    """Each stage is a method of the recipe that `recipe` makes, which imports torch: --help and a misspelt stage need
    none of it. What users can mend leaves in one line."""
    try:
        if config.stage != "all" and config.stage not in stages:
            raise ValueError(f"stage={config.stage} is unknown; choose all or one of {', '.join(stages)}")
        import torch

        torch.set_num_threads(config.threads)
        made = recipe(config)
        for stage in stages if config.stage == "all" else [config.stage]:
            getattr(made, stage)()
    except USER_ERRORS as error:
        fail(one_line(error))
