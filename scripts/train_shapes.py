"""Trains the embedded world from nothing: VAE, scorer, text encoder, UNet, transformer, and the model of videos.

python scripts/train_shapes.py                      # every stage, one process
python scripts/train_shapes.py stage=vae            # one stage; the same command continues a killed one
ACCELERATE_USE_CPU=true torchrun --nproc_per_node=2 scripts/train_shapes.py stage=unet
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

STAGES = ("vae", "scorer", "latents", "text", "unet", "export", "evaluate",
          "transformer", "export_transformer", "evaluate_transformer",
          "video_vae", "video_text", "video_latents", "video", "export_video", "evaluate_video")  # fmt: skip


def recipe(config: DictConfig) -> Any:
    from scripts.shapes_video_recipe import VideoRecipe

    return VideoRecipe(config)


@hydra.main(config_path="../configs", config_name="train_shapes", version_base=None)
def main(config: DictConfig) -> None:
    run_stages(config, STAGES, recipe)


if __name__ == "__main__":
    open_console()
    main()
