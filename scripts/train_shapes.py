"""Trains the embedded world from nothing: VAE, scorer, text encoder, UNet, transformer, and the model of videos.

python scripts/train_shapes.py                      # every stage, one process
python scripts/train_shapes.py stage=vae            # one stage; the same command continues a killed one
ACCELERATE_USE_CPU=true torchrun --nproc_per_node=2 scripts/train_shapes.py stage=unet
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

STAGES = ("vae", "scorer", "latents", "text", "unet", "export", "evaluate",
          "transformer", "export_transformer", "evaluate_transformer",
          "video_vae", "video_text", "video_latents", "video", "export_video", "evaluate_video")  # fmt: skip


@hydra.main(config_path="../configs", config_name="train_shapes", version_base=None)
def main(config: DictConfig) -> None:
    try:
        if config.stage != "all" and config.stage not in STAGES:
            raise ValueError(f"stage={config.stage} is unknown; choose all or one of {', '.join(STAGES)}")
        import torch  # here, since --help and a misspelt stage need none of this

        from scripts.shapes_video_recipe import VideoRecipe

        torch.set_num_threads(config.threads)
        recipe = VideoRecipe(config)
        for stage in STAGES if config.stage == "all" else [config.stage]:
            getattr(recipe, stage)()
    except USER_ERRORS as error:
        fail(one_line(error))


if __name__ == "__main__":
    open_console()
    main()
