"""Trains a small cascade of DeepFloyd IF's kind from nothing: 16 px from a caption, and 64 px from these.

python scripts/shapes_cascade.py                    # every stage, one after the other
python scripts/shapes_cascade.py stage=second       # one stage; the same command continues a killed one
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hydra
from omegaconf import DictConfig

from scripts.shapes_stages import run_stages
from slimstep.engine.console import open_console

STAGES = ("text", "first", "second", "export", "evaluate")


def recipe(config: DictConfig) -> Any:
    from scripts.shapes_cascade_recipe import CascadeRecipe

    return CascadeRecipe(config)


@hydra.main(config_path="../configs", config_name="shapes_cascade", version_base=None)
def main(config: DictConfig) -> None:
    run_stages(config, STAGES, recipe)


if __name__ == "__main__":
    open_console()
    main()
