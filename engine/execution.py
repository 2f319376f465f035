"""A checked configuration becomes a running job: libraries, accelerator, run directory, tracker.

What is imported here takes seconds; engine/launch.py, which answers mistakes and lists experiments, does without it.
"""

import logging
import os
import secrets
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from tqdm.contrib.logging import logging_redirect_tqdm

from slimstep import ROOT
from slimstep.engine.checked import USER_ERRORS, checked_config, run_path
from slimstep.engine.components import named_job
from slimstep.engine.config import as_dict
from slimstep.engine.files import damaged
from slimstep.engine.identity import SCORER_CHECK, WATCHING
from slimstep.engine.planning import Plan
from slimstep.engine.preemption import Preempted, was_preempted
from slimstep.engine.quiet import one_line
from slimstep.engine.run import FINISHED, PATIENCE, TRACEBACK, Run
from slimstep.engine.tracking import Tracker
from slimstep.engine.workflow import Workflow

log = logging.getLogger("slimstep")


def quiet_libraries() -> None:
    """Libraries speak only of errors."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def execute(config: DictConfig) -> int:
    """Runs one job, or a workflow of them, and returns its exit code, 1 after a mistake."""
    quiet_libraries()
    try:
        code = run_job(config) if not config.stages else run_workflow(config)
        if not config.plan:
            traceback_file(config).unlink(missing_ok=True)  # an earlier try's, in whose run nothing is wrong any more
        return code
    except (Preempted, Exception) as error:
        if was_preempted(error):
            if os.environ.get("RANK", "0") == "0":
                print("stopped by SIGTERM, from a scheduler or a rank that failed; the same command continues",
                      file=sys.stderr)  # fmt: skip
            raise Preempted from error
        if config.debug:
            raise
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f"rank {rank}: "
        print(f"{where}{message_of(error, config)}", file=sys.stderr)
        return 1
    finally:
        forget_accelerator(processes=True)  # the next job of a multirun may want another precision


def run_workflow(config: DictConfig) -> int:
    """A stage has its own configuration and its own tracker; the workflow has neither."""
    accelerator = make_accelerator(config)
    return Workflow(config, run_path(config), accelerator, run_job, planned_job, checked_config).execute()


def message_of(error: BaseException, config: DictConfig) -> str:
    """One line for what ended a job, and in which stage. The traceback of what nobody foresaw is kept in the run's
    directory."""
    stage = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, USER_ERRORS):
        error = error.__cause__  # what the component says, without Hydra's frame around it
    if isinstance(error, USER_ERRORS):
        return f"error: {stage}{one_line(error)}  (debug=true shows where)"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and is_lost_connection(error):
        return "stopped: another rank is gone; what it said of itself tells why. The same command continues"
    kept = traceback_file(config)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("".join(traceback.format_exception(error)))
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and "site-packages" not in f.filename]
    place = f"{Path(ours[-1].filename).relative_to(ROOT)}, line {ours[-1].lineno}"
    what = f"{stage}{type(error).__name__} in {place}: {one_line(error)}"
    return f"error: {what}  (not foreseen; its traceback is in {kept})"


def traceback_file(config: DictConfig) -> Path:
    """Where this rank keeps the traceback of what nobody foresaw."""
    return run_path(config) / f"{TRACEBACK}{os.environ.get('RANK', '0')}.txt"


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed since a neighbour is gone: NCCL and the store have types for it, gloo has none."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def make_accelerator(config: DictConfig, **options: Any) -> Accelerator:
    forget_accelerator()  # of the stage before, which may have had another precision
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=config.mixed_precision,
                       kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)], **options)  # fmt: skip


def forget_accelerator(processes: bool = False) -> None:
    """What Accelerate holds beside the process group, and of that as well."""
    AcceleratorState._reset_state(processes)
    GradientState._reset_state()


def make_run(config: DictConfig) -> Run:
    if config.threads:
        torch.set_num_threads(config.threads)
    path = run_path(config)
    accelerator = make_accelerator(config, log_with=config.tracker.log_with, project_dir=str(path))
    return Run(path, accelerator, seed=config.seed)


def planned_job(config: DictConfig, strict: bool = False) -> Plan:
    """What a job would do; nothing is written. Where its directory is another configuration's a plan is that of a new
    run, and says so; ValueError there if it is `strict`."""
    run = make_run(config)
    try:
        if not config.run.overwrite:
            run.check_config(as_dict(config), ignoring=WATCHING)
    except ValueError as error:
        if strict:
            raise
        log.warning(f"{one_line(error)}. This is the plan of a new run")
        run.path = run.path.with_name(f"{run.path.name}.new")
    plan = named_job(config.job)(config, run)
    assert isinstance(plan, Plan), f"{config.job} gave {plan!r} for plan=true"
    return plan


def run_job(config: DictConfig) -> int:
    """Runs or continues a job and returns its exit code; under plan=true it tells what it would do."""
    if config.plan:
        plan = planned_job(config)
        if int(os.environ.get("RANK", 0)) == 0:
            print(plan.text)
        return 0
    run = make_run(config)
    with leaving_nothing(run):
        return run_kept(config, run)


@contextmanager
def leaving_nothing(run: Run) -> Iterator[None]:
    """A start that fails before anything is made leaves no directory where there was none."""
    new = not run.path.exists()
    try:
        yield
    except Exception:
        if new and run.accelerator.is_main_process and not run.begun:
            for name in ("config.yaml", "tracker.json", SCORER_CHECK):
                (run.path / name).unlink(missing_ok=True)
            with suppress(OSError):  # a tracker may have left something
                run.path.rmdir()
        raise


def run_kept(config: DictConfig, run: Run) -> int:
    """Runs or continues a job in its directory, which keeps its configuration; returns the job's exit code."""
    path, job, resolved = run.path, named_job(config.job), as_dict(config)
    run.keep_config(resolved, ignoring=WATCHING, overwrite=config.run.overwrite)
    if config.tracker.log_with and getattr(job, "is_tracked", True) and not run.made(FINISHED):
        in_workflow = (path.parent / "stages").is_dir()  # many runs cannot share one id
        known_id = None if in_workflow else os.environ.get("WANDB_RUN_ID")  # by a W&B sweep's agent
        # A continued run keeps it.
        identity = run.json("tracker.json", lambda: {"id": known_id or secrets.token_hex(4)})
        with damaged(path / "tracker.json"):
            run_id = identity["id"]
        run.tracker = Tracker(run.accelerator, config.tracker, path, resolved, run_id)
    with logging_redirect_tqdm():
        code = job(config, run)
    assert isinstance(code, int), f"{config.job} gave {code!r}, which is no exit code"
    if run.tracker:
        run.tracker.finish()
    return code


def leave_processes() -> None:
    """Ends the process group, where there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
