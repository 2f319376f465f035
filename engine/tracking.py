"""Weights & Biases and TensorBoard behind one small interface; metrics.jsonl does not depend on either."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from slimstep.engine.config import TrackerConfig
from slimstep.engine.names import disk_name

LONGEST_OF_WANDB = 128  # letters of a run's name and group


class Tracker:
    """Metrics, images and tables of a run, sent through accelerate's trackers on rank 0."""

    def __init__(
        self, accelerator: Accelerator, config: TrackerConfig, run_path: Path, run_config: dict[str, Any], run_id: str
    ):
        self.accelerator = accelerator
        assert config.log_with, "a tracker of no kind"
        self.kind = config.log_with
        if find_spec(self.kind) is None:
            raise ValueError(f"tracker={self.kind} is not installed; pip install {self.kind}, or choose tracker=none")
        mode = os.environ.get("WANDB_MODE", config.mode)
        hparams = run_config if self.kind == "wandb" else None  # TensorBoard takes flat scalars only
        name, group = (disk_name(path.name, LONGEST_OF_WANDB) for path in (run_path, run_path.parent))
        wandb: dict[str, Any] = {"dir": str(run_path), "name": name, "group": group, "id": run_id, "mode": mode}
        wandb["resume"] = "allow"
        if self.kind == "wandb":
            import wandb as library

            wandb["settings"] = library.Settings(init_timeout=60)  # seconds; then a line says that no server answers
        try:
            accelerator.init_trackers(config.project, hparams, {"wandb": wandb} if self.kind == "wandb" else {})
        except Exception as error:  # W&B's own errors share no base with anything that could be named here
            raise ValueError(f"tracker={self.kind} (mode {mode}) does not start: {error}") from error

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        # W&B wants one increasing step for a run; stages have their own, so each brings its axis along.
        values = {f"{stage}/{key}": value for key, value in metrics.items()}
        if self.kind == "wandb":
            self.accelerator.log({**values, f"{stage}/step": step})
        else:
            self.accelerator.log(values, step=step)

    def images(self, name: str, images: list[Image.Image], captions: list[str]) -> None:
        if self.kind == "wandb":
            import wandb

            pictures = [wandb.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
            self.accelerator.log({name: pictures})
        elif self.accelerator.is_main_process:
            import numpy as np

            stack = np.stack([np.asarray(image) for image in images])
            self.accelerator.get_tracker("tensorboard", unwrap=True).add_images(name, stack, dataformats="NHWC")

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        if self.kind == "wandb":
            self.accelerator.get_tracker("wandb").log_table(name, columns=columns, data=rows)
        elif self.accelerator.is_main_process:
            lines = [" | ".join(map(str, row)) for row in [columns, ["---"] * len(columns), *rows]]
            self.accelerator.get_tracker("tensorboard", unwrap=True).add_text(name, "\n".join(lines))

    def finish(self) -> None:
        """Closes the trackers. The processes stay connected, for the next stage: not accelerator.end_training."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
