"""Checkpoints of the training loop: whole or recognised as torn, the newest few kept."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from slimstep.engine.ema import DeviceEMA
from slimstep.engine.files import digest, digests, unwritable, write_text
from slimstep.engine.objective import STUDENT
from slimstep.engine.sharding import is_deepspeed, is_sharded

log = logging.getLogger("slimstep")
MADE_BY = "made_by.json"
EMA_WEIGHTS = "ema.pt"
FORMER_EMA_WEIGHTS = "averages.pt"  # of earlier versions
FIRST_EMA_WEIGHTS = "custom_checkpoint_0.pkl"  # accelerate's name, of checkpoints before there was one of ours


@dataclass(eq=False)
class Checkpoints:
    """Accelerate states under `folder/step-00001000`, written aside and renamed; the newest `keep` are kept.

    The EMA of the weights, where there is one, lies beside them: rank 0 alone gathers and writes it. accelerate would
    ask every rank for a whole copy.

    `made_by.json`, written last, holds the number of processes, the names of the trained networks in the order in which
    accelerate numbers them, and the digest of every file: what a full disk or a power cut left of a checkpoint is found
    from a whole one.
    """

    folder: Path
    keep: int
    accelerator: Accelerator
    ema: DeviceEMA | None = None
    networks: tuple[str, ...] = (STUDENT,)

    def steps(self) -> list[int]:
        names = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int) -> None:
        aside = self.folder / f".step-{step:08d}.aside"
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        with unwritable(aside):
            self.accelerator.save_state(str(aside))
            self.save_ema(aside / EMA_WEIGHTS)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            made_by = {"processes": self.accelerator.num_processes, "networks": self.networks, "files": digests(aside)}
            write_text(aside / MADE_BY, json.dumps(made_by))
            aside.rename(self.path(step))
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))
        self.accelerator.wait_for_everyone()

    def load_newest(self, agreed: Callable[[int | None], int]) -> int:
        """Loads the newest whole checkpoint and returns its step, 0 where there is none; names the torn ones.

        `agreed` gives rank 0's word to all: it alone reads the digests.
        """
        step = agreed(self.newest_whole() if self.accelerator.is_main_process else None)
        if step == 0:
            return 0
        path = self.path(step)
        made_by = json.loads((path / MADE_BY).read_text())
        processes, networks = made_by["processes"], made_by.get("networks", [STUDENT])  # earlier versions say none
        if processes != self.accelerator.num_processes:
            raise ValueError(
                f"{path} was made by {processes} process(es) and this is {self.accelerator.num_processes}; "
                f"start with {processes}, or remove the folder to begin the stage again"
            )
        if tuple(networks) != self.networks:
            raise ValueError(
                f"{path} holds the networks {networks} and the objective trains {list(self.networks)}; give this run "
                f"another name=, or remove the folder to begin the stage again"
            )
        self.load_state(path)
        return step

    def save_ema(self, file: Path) -> None:
        if self.ema:
            writes = self.accelerator.is_main_process
            state = self.ema.state_dict(keep=writes)  # all ranks together: it gathers shards
            if writes:
                torch.save(state, file)

    def load_state(self, path: Path) -> None:
        """Ranks of a machine that read whole states do so in turn: its memory holds one copy, and not one for each."""
        accelerator, first = self.accelerator, self.ema and (path / FIRST_EMA_WEIGHTS).exists()
        if first:
            accelerator.register_for_checkpointing(self.ema)
        together = is_sharded(accelerator) or is_deepspeed(accelerator)  # these read a shard each, and wait for others
        for turn in range(1 if together else accelerator.num_processes):
            if together or accelerator.local_process_index == turn:
                accelerator.load_state(str(path))
            accelerator.wait_for_everyone()
        accelerator._custom_objects.clear()
        if self.ema and not first:
            file = next(path / name for name in (EMA_WEIGHTS, FORMER_EMA_WEIGHTS) if (path / name).exists())
            self.ema.load_state_dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))

    def newest_whole(self) -> int:
        """The newest step whose files are those that were written; torn checkpoints are named and removed."""
        for step in reversed(self.steps()):
            fault = torn(self.path(step))
            if fault is None:
                return step
            log.warning(f"{self.path(step)} is torn ({fault}); the checkpoint before it is used")
            shutil.rmtree(self.path(step))
        return 0


def torn(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None where it is whole."""
    try:
        files = json.loads((path / MADE_BY).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"no readable {MADE_BY}"
    for name, written in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if digest(path / name) != written:
            return f"{name} is not what was written"
    return None
