"""Trains a small cascade of DeepFloyd IF's kind from nothing: 16 px from a caption, and 64 px from these.

python scripts/shapes_cascade.py                    # every stage, one after the other
python scripts/shapes_cascade.py stage=second       # one stage; the same command continues a killed one
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hydra
from omegaconf import DictConfig

from slimstep.engine.checked import USER_ERRORS
from slimstep.engine.console import open_console
from slimstep.engine.launch import fail
from slimstep.engine.quiet import one_line

STAGES = ("text", "first", "second", "export", "evaluate")


@hydra.main(config_path="../configs", config_name="shapes_cascade", version_base=None)
def main(config: DictConfig) -> None:
    try:
        if config.stage != "all" and config.stage not in STAGES:
            raise ValueError(f"stage={config.stage} is unknown; choose all or one of {', '.join(STAGES)}")
        import torch  # here, since --help and a misspelt stage need none of this

        from scripts.shapes_cascade_recipe import CascadeRecipe

        torch.set_num_threads(config.threads)
        recipe = CascadeRecipe(config)
        for stage in STAGES if config.stage == "all" else [config.stage]:
            getattr(recipe, stage)()
    except USER_ERRORS as error:
        fail(one_line(error))


if __name__ == "__main__":
    open_console()
    main()
