"""A workflow of jobs: each stage is an experiment with a run directory of its own, RUN/STAGE, that others build upon.

    stages:
      prune_unet: {search: {target_fraction: 0.75}}                   # what changes in +experiment=prune_unet
      distill_steps: {distillation: {student: "${made:prune_unet/export}"}} # an artifact of an earlier stage

A stage is what train.py would run by hand with the overrides of its command, which RUN/stages/STAGE.json keeps. What
is finished is skipped; a stage whose inputs were made anew since is moved aside and made anew, too.
"""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slimstep import ROOT
from slimstep.engine.artifacts import changed, files_of, seen
from slimstep.engine.components import named_job
from slimstep.engine.config import as_dict
from slimstep.engine.files import whole_folder, write_json
from slimstep.engine.identity import WATCHING
from slimstep.engine.overrides import compose, hydra_value, stage_overrides, strings
from slimstep.engine.parallel import free_memory
from slimstep.engine.planning import Plan, duration
from slimstep.engine.renamed import EXPERIMENTS, map_texts, with_new_artifacts
from slimstep.engine.run import Run

OF_LAUNCHERS = (
    "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_", "SLURM_", "SUBMITIT_",
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP",
)  # fmt: skip
log = logging.getLogger("slimstep")


@dataclass(frozen=True)
class Stage:
    """`overrides` are its command's; `inputs` the earlier artifacts that they name, relative to the workflow."""

    name: str
    overrides: tuple[str, ...]
    inputs: tuple[str, ...]

    @property
    def command(self) -> str:
        return shlex.join(["python", "train.py", *self.overrides])


@dataclass(eq=False)
class Workflow:
    """The stages of one configuration, in their order, under `path`.

    run_job runs one checked configuration and returns its exit code, planned_job tells what it would do, or with strict
    refuses a directory of another configuration; checked makes a checked configuration from a composed one.
    """

    config: DictConfig
    path: Path
    accelerator: Accelerator
    run_job: Callable[[DictConfig], int]
    planned_job: Callable[..., Plan]
    checked: Callable[[DictConfig], DictConfig]

    def __post_init__(self) -> None:
        self.run = Run(self.path, self.accelerator)
        self.stages = [self.stage(name) for name in self.names]
        self.configs: dict[str, DictConfig] = {}

    @property
    def names(self) -> list[str]:
        """Of the stages, but for those that are left out, as by stages.prune_vae=null."""
        return [name for name, table in self.config.stages.items() if table is not None]

    def stage(self, name: str) -> Stage:
        """What the configuration says of a stage, as a command."""
        table = self.config.stages[name]
        if not OmegaConf.is_dict(table):
            raise ValueError(f"stages.{name}={table} must be a table of what changes in +experiment={name}, or null")
        content = as_dict(table)
        prefix = f"{self.path}/"
        inputs = tuple(dict.fromkeys(text.removeprefix(prefix) for text in strings(content) if text.startswith(prefix)))
        if placed := {"root", "name"} & set(content):
            raise ValueError(f"stages.{name}.{min(placed)}: a stage lies under its workflow, in {self.path / name}")
        before = self.names[: self.names.index(name)]
        for artifact in inputs:
            if artifact.split("/")[0] not in before and not (self.path / artifact).exists():
                raise ValueError(f"stages.{name} is made from {self.path / artifact}, which no stage before it makes")
        place = {"root": str(self.path), "name": name}
        cache = {"data": {"cache": {"folder": str(self.config.data.cache.folder)}}}
        overrides = stage_overrides(name, as_dict(cast(DictConfig, OmegaConf.merge(cache, content)), resolve=False))
        return Stage(name, (*overrides, *(f"{key}={hydra_value(value)}" for key, value in place.items())), inputs)

    def composed(self, stage: Stage) -> DictConfig:
        """The stage's configuration, checked; ValueError that names the stage where its overrides do not fit."""
        try:
            return self.checked(compose(stage.overrides))
        except (ValueError, HydraException, OmegaConfBaseException) as error:
            raise ValueError(f"stages.{stage.name}: {' '.join(str(error).split())}") from error

    # ---- running ----

    def execute(self) -> int:
        """Makes what is not made; returns the exit code: the highest of the stages'."""
        if self.config.restart is not None and self.config.restart not in self.names:
            raise ValueError(f"restart={self.config.restart} is no stage; there are {', '.join(self.names)}")
        self.configs = {stage.name: self.composed(stage) for stage in self.stages}
        if self.config.plan:
            return self.plan()
        self.adopt_renamed_stages()
        own = self.path / "export"
        if own.is_dir() and not own.is_symlink() and not self.export_file.is_file():
            raise ValueError(f"{own} is a folder that this run has not made, where the student belongs: rename it")
        restarted = self.restarted()
        if left := [stage for stage in self.stages if stage.name in restarted or not self.is_done(stage)]:
            self.check(left, restarted)
        self.put_aside(restarted)
        codes = [self.skip(stage) if self.is_done(stage) else self.make(stage) for stage in self.stages]
        self.copy_export()
        if self.accelerator.is_main_process:
            self.restart_file.unlink(missing_ok=True)
        return max(codes)

    def adopt_renamed_stages(self) -> None:
        """A stage that an earlier version has made under another name is this one's; its old folder is a link to it."""
        for old, new in EXPERIMENTS.items() if self.accelerator.is_main_process else ():
            if self.record_file(old).is_file() and not (self.path / new).exists():
                shutil.copy(self.record_file(old), self.record_file(new))
                (self.path / old).rename(self.path / new)
                (self.path / old).symlink_to(new)
        self.accelerator.wait_for_everyone()

    @property
    def restart_file(self) -> Path:
        """Says which restart has begun: the same command, killed and given again, goes on with it."""
        return self.path / "stages" / "restart.json"

    def restarted(self) -> list[str]:
        """The stages from `restart` on, where they have not begun anew already."""
        names, first = self.names, self.config.restart
        begun = self.run.agreed(self.restart_file.is_file() and json.loads(self.restart_file.read_text()) == [first])
        return [] if first is None or begun else names[names.index(first) :]

    def put_aside(self, names: list[str]) -> None:
        if names and self.accelerator.is_main_process:
            for name in names:
                self.forget(name, f"restart={self.config.restart} asks for it")
            write_json(self.restart_file, [self.config.restart])
        self.accelerator.wait_for_everyone()

    def check(self, stages: list[Stage], restarted: list[str]) -> None:
        """Everything that a stage asks for is looked at before the first begins: ValueError where it is not there."""
        log.info(f"checking {', '.join(stage.name for stage in stages)}")
        unmeasured = dict.fromkeys(("forward", "sampling", "training", "decoding"), 1.0)
        for stage in stages:
            aside = {"run": {"overwrite": True}} if stage.name in restarted else {}
            with naming_stage(stage):
                self.planned_job(self.planned(stage, rates=unmeasured, **aside), strict=True)
            free_memory()

    def plan(self) -> int:
        """Tells what every stage would do, and how long all take."""
        hours = 0.0
        for stage in self.stages:
            absent = self.absent(stage)
            note = f" (not made yet, the teacher stands for models: {', '.join(absent)})" if absent else ""
            with naming_stage(stage):
                plan = self.planned_job(self.planned(stage))
            hours += plan.hours
            if self.accelerator.is_main_process:
                print(f"\n## {stage.name}{note}\n\n{stage.command}\n\n{plan.text}", flush=True)
            free_memory()
        if self.accelerator.is_main_process:
            print(f"\nall stages: about {duration(hours)} of running networks; loading, timing, compiling on top of it")
        return 0

    def planned(self, stage: Stage, **changes: Any) -> DictConfig:
        """With plan=true. The teacher, as large as any, stands for models that are not made yet; null for files."""
        config = as_dict(self.configs[stage.name], resolve=False)
        teacher = self.config.model.get("name_or_path")
        stand_ins = {str(self.path / name): None if Path(name).suffix else teacher for name in self.absent(stage)}
        config = map_texts(config, lambda text: stand_ins.get(text, text))
        return self.checked(OmegaConf.create({**config, "plan": True, **changes}))

    def absent(self, stage: Stage) -> list[str]:
        """The artifacts that a stage is made from and that are not made yet."""
        return [artifact for artifact in stage.inputs if not (self.path / artifact).exists()]

    def make(self, stage: Stage) -> int:
        """Runs or continues a stage whose inputs are there, and keeps what it was made from."""
        inputs = self.run.of_rank_0(lambda: self.seen_inputs(stage))
        if self.accelerator.is_main_process:
            record = self.record(stage.name)
            if record.get("inputs", inputs) != inputs:
                self.forget(stage.name, f"{changed(record['inputs'], inputs)} is another now")
            write_json(self.record_file(stage.name), {"command": stage.command, "inputs": inputs})
        self.accelerator.wait_for_everyone()
        log.info(f"── {stage.name} ── {stage.command}")
        config = self.configs[stage.name]
        alone = getattr(named_job(config.job), "one_process", False) and self.accelerator.num_processes > 1
        with naming_stage(stage), self.leaving_nothing(stage):
            code = self.run_alone(stage) if alone else self.run_job(config)
        free_memory()
        if self.accelerator.is_main_process:
            outcome = {"exit_code": code, "files": self.sizes(stage.name)}
            write_json(self.record_file(stage.name), {"command": stage.command, "inputs": inputs, **outcome})
        self.accelerator.wait_for_everyone()
        return code

    @contextmanager
    def leaving_nothing(self, stage: Stage) -> Iterator[None]:
        """A stage that fails before it has made anything leaves no record, and a workflow without any no directory."""
        try:
            yield
        except Exception:
            if self.accelerator.is_main_process and not (self.path / stage.name).exists():
                self.record_file(stage.name).unlink(missing_ok=True)
                with suppress(OSError):  # there are others
                    self.record_file(stage.name).parent.rmdir()
                    self.path.rmdir()
            raise

    def skip(self, stage: Stage) -> int:
        log.info(f"── {stage.name} ── done: {self.path / stage.name}")
        return self.record(stage.name)["exit_code"]

    def run_alone(self, stage: Stage) -> int:
        """A stage that takes one process, in a new one of rank 0's, while others wait. ValueError where it fails."""
        code = None
        if self.accelerator.is_main_process:
            free_memory()
            env = {key: value for key, value in os.environ.items() if not key.startswith(OF_LAUNCHERS)}
            program = [str(file)] if (file := ROOT / "train.py").exists() else ["-m", "slimstep"]
            process = subprocess.Popen([sys.executable, *program, *stage.overrides], env=env)
            try:
                code = process.wait()
            finally:
                process.terminate()
                process.wait()
        code = self.run.agreed(code)
        if code:
            raise ValueError(f"the stage left with exit code {code}; what it said is above")
        return code

    def copy_export(self) -> None:
        """RUN/export is that of the last stage that has one: a folder of its own, which may be changed and moved."""
        made = [stage.name for stage in self.stages if (self.path / stage.name / "export").is_dir()]
        if made and self.accelerator.is_main_process:
            source, target = self.path / made[-1] / "export", self.path / "export"
            made_of = {str(Path(made[-1]) / "export"): seen(source)}
            if not target.is_dir() or target.is_symlink() or self.export_record() != made_of:
                write_json(self.export_file, {})  # a killed copy is made again
                if target.is_symlink():  # as earlier versions left one
                    target.unlink()
                with whole_folder(target) as aside:
                    shutil.copytree(source, aside, dirs_exist_ok=True)
                write_json(self.export_file, made_of)
            log.info(f"the student: {target.absolute()}")
        self.accelerator.wait_for_everyone()

    @property
    def export_file(self) -> Path:
        """Says what RUN/export is a copy of."""
        return self.path / "stages" / "export.json"

    def export_record(self) -> dict[str, Any] | None:
        return with_new_artifacts(json.loads(self.export_file.read_text())) if self.export_file.is_file() else None

    # ---- what is there ----

    def record_file(self, name: str) -> Path:
        return self.path / "stages" / f"{name}.json"

    def record(self, name: str) -> dict[str, Any]:
        """What is known of a stage: its command and inputs; once it is finished its exit code and files."""
        file = self.record_file(name)
        record = self.run.load(str(file.relative_to(self.path))) if file.exists() else {}
        return {**record, "inputs": with_new_artifacts(record["inputs"])} if "inputs" in record else record

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage is finished, by this configuration, from the inputs that are there."""

        def look() -> bool:
            record = self.record(stage.name)
            if record.get("files") != self.sizes(stage.name):
                return False
            config = as_dict(self.configs[stage.name])
            same = not Run(self.path / stage.name, self.accelerator).changed(config, WATCHING)
            return same and record["inputs"] == self.seen_inputs(stage)

        return self.run.of_rank_0(look)

    def seen_inputs(self, stage: Stage) -> dict[str, Any]:
        """{artifact: {file: digest}} of what the stage is made from; empty where an artifact is not made yet."""
        return {artifact: seen(self.path / artifact) for artifact in stage.inputs}

    def sizes(self, name: str) -> dict[str, int]:
        """The bytes of every file of a stage's run."""
        folder = self.path / name
        return {str(path.relative_to(folder)): path.stat().st_size for path in files_of(folder)}

    def forget(self, name: str, why: str) -> None:
        """Moves a stage's run aside, to the next free NAME.before-N."""
        if (self.path / name).exists():
            Run(self.path / name, self.accelerator).move_aside(why)
        self.record_file(name).unlink(missing_ok=True)  # last: without it what is there would pass for new


@contextmanager
def naming_stage(stage: Stage) -> Iterator[None]:
    """What ends the stage's job carries the stage's name as a note."""
    try:
        yield
    except Exception as error:
        error.add_note(f"stages.{stage.name}")
        raise
