"""A run is a directory, and what exists in it is not made again.

The same command continues a killed run. Rank 0 decides what exists and tells the others, so that all take the same way.
"""

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from slimstep.engine.artifacts import CARD
from slimstep.engine.files import damaged, digests, load_json, whole_folder, write_json, write_tensors, write_text
from slimstep.engine.identity import differences, has_begun, has_grown
from slimstep.engine.names import disk_name
from slimstep.engine.tracking import Tracker

log = logging.getLogger("slimstep")
PATIENCE = timedelta(hours=6)  # of ranks that wait while rank 0 compiles and times; torchrun ends them where it dies
FINISHED = "report.html"  # what a job that has something to track writes last
TRACEBACK = "traceback-rank-"


class Run:
    """The directory of one run, its metrics log and its tracker, shared by all ranks."""

    def __init__(self, path: str | Path, accelerator: Accelerator, tracker: Tracker | None = None, seed: int = 0):
        self.path = Path(path)
        self.accelerator = accelerator
        self.tracker = tracker
        self.seed = seed

    def agreed(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Ranks that wait for it sleep, whatever rank 0 is timing meanwhile."""
        box = [value]
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(box, src=0, group=sleeping_ranks())
        return box[0]

    def of_rank_0(self, make: Callable[[], Any]) -> Any:
        """What rank 0 alone makes, on every rank."""
        return self.agreed(make() if self.accelerator.is_main_process else None)

    def keep_config(self, config: dict[str, Any], ignoring: Sequence[str], overwrite: bool = False) -> None:
        """Writes config.yaml. Raises ValueError where another configuration has already made something here.

        Lists of GROWING may have more at their end than they had: what is there stays, and the rest is made.
        With `overwrite` what was made is moved aside instead, to the next free NAME.before-N.
        """
        if overwrite and self.of_rank_0(lambda: self.differing(config, ignoring)):
            if self.accelerator.is_main_process:
                self.move_aside("it was made by another configuration")
            self.accelerator.wait_for_everyone()
        self.check_config(config, ignoring)
        if self.accelerator.is_main_process and (not self.begun or self.changed(config, ignoring)):
            (self.path / FINISHED).unlink(missing_ok=True)
            write_text(self.path / "config.yaml", OmegaConf.to_yaml(config))
        self.accelerator.wait_for_everyone()

    def check_config(self, config: dict[str, Any], ignoring: Sequence[str]) -> None:
        """Raises ValueError where another configuration has already made something here."""
        if differing := self.of_rank_0(lambda: self.differing(config, ignoring)):
            changes = [f"{key}: {old!r} there, {new!r} now" for key, (old, new) in differing.items()]
            raise ValueError(
                f"{self.path} was made by another configuration ({'; '.join(changes[:5])}); give this run another "
                f"name=, remove it, or let run.overwrite=true move it aside"
            )

    @property
    def begun(self) -> bool:
        """Whether something was made here that belongs to a configuration."""
        return has_begun(self.path)

    def differing(self, config: dict[str, Any], ignoring: Sequence[str]) -> dict[str, tuple[Any, Any]]:
        """{dotted key: (there, now)} where what is here was made by another configuration."""
        return {key: pair for key, pair in self.changed(config, ignoring).items() if not has_grown(key, *pair)}

    def changed(self, config: dict[str, Any], ignoring: Sequence[str]) -> dict[str, tuple[Any, Any]]:
        """{dotted key: (there, now)} of all that is not what it was."""
        if not self.begun:
            return {}
        with damaged(self.path / "config.yaml"):
            existing = OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml"))
            if not isinstance(existing, dict) or not existing:
                raise ValueError("it is no configuration")
        ignored = tuple(f"{key}." for key in ignoring)
        return {key: pair for key, pair in differences(existing, config).items() if not f"{key}.".startswith(ignored)}

    def move_aside(self, why: str) -> None:
        names = (self.path.with_name(disk_name(f"{self.path.name}.before-{n}")) for n in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        self.path.rename(aside)
        log.warning(f"{self.path} begins anew, for {why}; what was there is now {aside}")

    def made(self, name: str) -> bool:
        return self.agreed((self.path / name).exists())

    def json(self, name: str, make: Callable[[], Any]) -> Any:
        """The content of `name`; made by all ranks together, and written by rank 0, where it does not exist yet."""
        self.keep(name, make, write_json)
        return self.load(name)

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The same of a safetensors file."""
        self.keep(name, make, write_tensors)
        with damaged(self.path / name):
            return load_file(self.path / name)

    def keep(self, name: str, make: Callable[[], Any], write: Callable[[Path, Any], None]) -> None:
        if not self.made(name):
            value = make()
            if self.accelerator.is_main_process:
                write(self.path / name, value)
        self.accelerator.wait_for_everyone()

    def load(self, name: str) -> Any:
        """A JSON artifact of an earlier stage. ValueError where the file is damaged."""
        return load_json(self.path / name)

    def folder(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder `name`, filled by rank 0 alone where it does not exist yet."""
        if not self.made(name) and self.accelerator.is_main_process:
            with whole_folder(self.path / name) as aside:
                make(aside)
        self.accelerator.wait_for_everyone()
        return self.path / name

    def sealed_folder(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder `name`, filled by rank 0 where it does not exist yet, and the digests of its files beside it.

        Raises ValueError where the folder exists and is not what was written.
        """
        seal = f"{name}.sealed.json"
        if not (self.made(seal) and self.made(name)):
            if self.accelerator.is_main_process:
                make(self.path / name)
                write_json(self.path / seal, self.sealed(name))
        elif wrong := self.of_rank_0(lambda: self.load(seal).items() ^ self.sealed(name).items()):
            files = ", ".join(sorted({file for file, _ in wrong}))
            way = f"remove {self.path / seal} to make it again"
            raise ValueError(f"{self.path / name} is not what was written: {files}; {way}")
        self.accelerator.wait_for_everyone()
        return self.path / name

    def sealed(self, name: str) -> dict[str, str]:
        """The digest of every file of a folder but its model card, which may be written anew and edited."""
        return {file: digest for file, digest in digests(self.path / name).items() if file != CARD}

    def log(
        self,
        stage: str,
        step: int,
        metrics: dict[str, float],
        rates: dict[str, float] | None = None,
        tracked: bool = True,
    ) -> None:
        """Appends a line to metrics.jsonl; the tracker gets it too, and `rates`, which no two runs share, beside it.

        Not `tracked` on the way out: a scheduler's signal may have ended the tracker's own process already.
        """
        if not self.accelerator.is_main_process:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")
        if self.tracker and tracked:
            self.tracker.log(stage, step, {**metrics, **(rates or {})})

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what `stage` logged after `step`: a continued run will log it again. A torn last line goes too."""
        path = self.path / "metrics.jsonl"
        if not self.accelerator.is_main_process or not path.exists():
            return
        whole_lines = path.read_text().rpartition("\n")[0].splitlines()
        with damaged(path):
            kept = [x for x in whole_lines if (line := json.loads(x))["stage"] != stage or line["step"] <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))


@cache
def sleeping_ranks() -> torch.distributed.ProcessGroup:
    """All ranks over gloo: those that wait for NCCL spin."""
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, torch.distributed.ProcessGroup), "every rank belongs to it"
    return group
