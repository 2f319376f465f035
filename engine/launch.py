"""From the command line to a job: configuration, accelerator, run directory, and one clear line for a mistake."""

import difflib
import logging
import os
import secrets
import sys
import traceback
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import diffusers
import hydra
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from tqdm.contrib.logging import logging_redirect_tqdm
from yaml import YAMLError

import engine.config  # noqa: F401  registers the schema
from engine.chain import Chain
from engine.components import named_job
from engine.config import Config
from engine.planning import Plan
from engine.preemption import CONTINUE_ME, Preempted, leave_on_sigterm
from engine.run import FINISHED, PATIENCE, TRACEBACK, WATCHING, Run, damaged
from engine.sections.checks import at_least
from engine.sections.training import DataConfig
from engine.tracking import Tracker
from models.quiet import one_line

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
MISTAKES = (ValueError, OSError, FloatingPointError, SafetensorError, YAMLError, HydraException, OmegaConfBaseException)
PRECISIONS = ("no", "bf16", "fp16")
MULTIRUN = {"-m", "--multirun"}
log = logging.getLogger("slimstep")

OmegaConf.register_new_resolver("here", lambda path: str(ROOT / path), replace=True)
# In a chain: a product of another stage, and the last of a list.
OmegaConf.register_new_resolver("made", lambda product, *, _root_: str(run_path(_root_) / product), replace=True)
OmegaConf.register_new_resolver("last", lambda values: values[-1], replace=True)


def main() -> None:
    """Runs the experiment the command line names. Exit codes: 0, 1 for a mistake, 75 after SIGTERM, or the job's."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if not os.environ.get(name, "0").isdigit():
            fail(f"the environment's {name}={os.environ[name]} is no number; launchers set it, unset it otherwise")
    set_up()
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in MULTIRUN)  # argparse wants it before the overrides
    # A stage's table names some of its keys; the others are added.
    sys.argv[1:] = [f"++{word}" if word.startswith("stages.") else word for word in sys.argv[1:]]
    check_overrides(sys.argv[1:])
    sys.argv += named_by_what_is_swept(sys.argv[1:])
    leave_on_sigterm()
    codes: list[int] = []  # a multirun goes on after a job that failed, and tells in the end

    def job(config: DictConfig) -> None:
        if "SUBMITIT_EXECUTOR" in os.environ:
            start_in_queue(config)
        else:
            codes.append(start(config))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what a sweep's folder or launcher does, and prints nothing
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(job)()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command continues", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if was_preempted(error):
            sys.exit(CONTINUE_ME)
        if "debug=true" in sys.argv:
            raise
        fail(f"{one_line(error)}  (debug=true shows where)")
    if 1 not in codes and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # where a rank failed this could wait for it
    sys.exit(1 if 1 in codes else max(codes, default=0))


def named_by_what_is_swept(words: list[str]) -> list[str]:
    """For a multirun, Hydra's own override that leaves out of a job's name what is the same in every job."""
    if not MULTIRUN & set(words):
        return []
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException:
        return []  # Hydra itself will say what is wrong
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    same = [override.key_or_group for override in parsed if override.key_or_group not in swept]
    return [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(same)}]"]


def set_up() -> None:
    """Libraries speak only of errors; rank 0 tells what is done."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    log.setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def start_in_queue(config: DictConfig) -> None:
    """One job of `hydra/launcher=submitit_slurm`, in its own process; RuntimeError where it fails, so that Slurm knows.

    SIGTERM and SIGUSR2 are submitit's here: it puts the job back into the queue, and the run goes on where it was.
    """
    from submitit.helpers import TorchDistributedEnvironment

    place = TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    set_up()
    code = start(config)
    if code == 1:
        raise RuntimeError(f"rank {place.rank} failed: what it said is in the log beside this one")


def check_overrides(overrides: list[str]) -> None:
    """Leaves with one line that names the first override that does not fit, and the choices there are."""
    overrides = [first_of_sweep(word) for word in overrides if word not in MULTIRUN]
    if any(word.startswith("-") for word in overrides):
        return  # --help, --cfg: Hydra's own commands
    if len(sources := [word for word in overrides if word.startswith("data.source=")]) > 1:
        told = f"data.source is given {len(sources)} times, {sources[0]} first"
        fail(f"{told}: where a shell has written braces out, quote them, 'data.source=…{{000..127}}.tar'")
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            hydra.compose("train", overrides)
        except MISTAKES as error:
            fail(explain(error, overrides) if int(os.environ.get("RANK", 0)) == 0 else "")


def first_of_sweep(word: str) -> str:
    """The override with the first of its values where it sweeps over several; else as it is."""
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return word
    if not override.is_sweep_override():
        return word
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


def explain(error: Exception, overrides: list[str]) -> str:
    """Hydra's message in one line; where an override names a key that is not there, the keys that are."""
    ordered = sorted(overrides, key=lambda override: not override.startswith("+"))  # the experiment brings its keys
    for k, override in enumerate(ordered):
        try:
            hydra.compose("train", ordered[: k + 1])
        except MISTAKES as culprit:
            parent, _, leaf = override.partition("=")[0].lstrip("+~").rpartition(".")
            before = hydra.compose("train", ordered[:k])
            section = OmegaConf.select(before, parent) if parent else before
            changes = override[:1] not in ("+", "~") and "/" not in leaf
            if changes and OmegaConf.is_dict(section) and leaf not in section:
                if leaf == "experiment":
                    return f"{override}: an experiment is added, +{override}"
                close = difflib.get_close_matches(leaf, map(str, section), n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                where = parent or "the configuration"
                return f"{override}: {where} has no key {leaf!r}; {hint}keys: {', '.join(section)}"
            choices = sorted(path.stem for path in (CONFIGS / leaf).glob("*.yaml"))
            told = f" (there are {', '.join(choices)})" if choices and "group" in str(culprit) else ""
            return f"{override}: {one_line(culprit.__cause__ or culprit)}{told}"
    return one_line(error)


def fail(message: str) -> None:
    """Leaves with exit code 1; an empty message is for the ranks whose neighbour says the same."""
    if message:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def start(config: DictConfig) -> int:
    """Runs one job and returns its exit code, 1 after a mistake."""
    if config.job is None and not config.stages:
        list_experiments()
        given = HydraConfig.get().overrides.task
        if given:
            print(f"error: {' '.join(given)} names no experiment; add +experiment=NAME", file=sys.stderr)
        return int(bool(given))
    try:
        checked = checked_config(config)
    except MISTAKES as error:  # the same on every rank, and told by one
        if config.debug:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {one_line(error)}  (debug=true shows where)", file=sys.stderr)
        return 1
    try:
        return run_chain(checked) if checked.stages else run_job(checked)
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
        print(f"{where}{told(error, config)}", file=sys.stderr)
        return 1
    finally:
        AcceleratorState._reset_state(True)  # the next job of a multirun may want another precision
        GradientState._reset_state()


def was_preempted(error: BaseException | None) -> bool:
    """Whether SIGTERM is what ended the job, also where a library's own clean-up failed on the way out."""
    return error is not None and (isinstance(error, Preempted) or was_preempted(error.__context__))


def told(error: Exception, config: DictConfig) -> str:
    """One line for what ended a job, and in which stage. The traceback of what nobody foresaw is kept in the run's
    directory."""
    stage = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, MISTAKES):
        error = error.__cause__  # what the component says, without Hydra's frame around it
    if isinstance(error, MISTAKES):
        return f"error: {stage}{one_line(error)}  (debug=true shows where)"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and is_lost_connection(error):
        return "stopped: another rank is gone; what it said of itself tells why. The same command continues"
    kept = run_path(config) / f"{TRACEBACK}{os.environ.get('RANK', '0')}.txt"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("".join(traceback.format_exception(error)))
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and "site-packages" not in f.filename]
    place = f"{Path(own[-1].filename).relative_to(ROOT)}, line {own[-1].lineno}"
    what = f"{stage}{type(error).__name__} in {place}: {one_line(error)}"
    return f"error: {what}  (not foreseen; its traceback is in {kept})"


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed since a neighbour is gone: NCCL and the store have types for it, gloo has none."""
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def checked_config(config: DictConfig) -> DictConfig:
    """The configuration in its typed form. ValueError for keys nobody reads, and values that cannot be."""
    if unknown := list(unknown_keys(OmegaConf.structured(Config), config)):
        raise ValueError(f"the configuration has no key {unknown[0]}, which +{unknown[0]}=… would add")
    config = OmegaConf.merge(OmegaConf.structured(Config), config)
    for section in config:
        if OmegaConf.is_config(config[section]):
            OmegaConf.to_container(config[section], structured_config_mode=SCMode.INSTANTIATE)  # the typed ones check
    if config.job is not None:
        config.stages = None  # a budget has values for chains, too
    at_least("the configuration", config, 0, "threads")
    if config.threads > (cores := os.cpu_count() or 1):
        raise ValueError(f"threads={config.threads}, but there are {cores} cores; 0 leaves the choice to torch")
    if config.mixed_precision not in PRECISIONS:
        raise ValueError(f"mixed_precision={config.mixed_precision!r} is unknown; choose from {PRECISIONS}")
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("mixed_precision=fp16 needs a GPU, and there is none; choose bf16, or no for float32")
    check_data(config.data)
    run_path(config)
    return config


def check_data(data: DictConfig | None) -> None:
    """ValueError, or Hydra's own, for keys that the group with these pairs has not, and values that cannot be."""
    if data is None:
        raise ValueError(f"data=null: choose one of {', '.join(path.stem for path in (CONFIGS / 'data').iterdir())}")
    kind = "pairs._target_"
    groups = [OmegaConf.load(path) for path in (CONFIGS / "data").glob("*.yaml")]
    same = (group for group in groups if OmegaConf.select(group, kind) == OmegaConf.select(data, kind))
    known = list(next(same, data))  # pairs of the user's own may have any keys
    if unknown := [key for key in data if key not in known]:
        raise ValueError(f"data has no key {unknown[0]}, which +data.{unknown[0]}=… would add; keys: {', '.join(data)}")
    schema = OmegaConf.create({"data": OmegaConf.structured(DataConfig)})
    given = {key: value for key, value in OmegaConf.to_container(data, resolve=True).items() if key in schema.data}
    OmegaConf.to_object(OmegaConf.merge(schema, {"data": given}).data)


def run_chain(config: Config) -> int:
    """Every stage in turn. A stage has its own configuration and its own tracker; the chain has neither."""
    return Chain(config, run_path(config), make_accelerator(config), run_job, planned_job, checked_config).execute()


def make_accelerator(config: Config, **options) -> Accelerator:
    forget_accelerator()  # of the stage before, which may have had another precision
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=config.mixed_precision,
                       kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)], **options)  # fmt: skip


def forget_accelerator() -> None:
    """What Accelerate holds beside the process group."""
    AcceleratorState._reset_state()
    GradientState._reset_state()


def make_run(config: Config) -> Run:
    if config.threads:
        torch.set_num_threads(config.threads)
    path = run_path(config)
    accelerator = make_accelerator(config, log_with=config.tracker.log_with, project_dir=str(path))
    return Run(path, accelerator, seed=config.seed)


def planned_job(config: Config) -> Plan:
    """What a job would do; nothing is written."""
    run = make_run(config)
    if not config.run.overwrite:
        run.check_config(OmegaConf.to_container(config, resolve=True), ignoring=WATCHING)
    return named_job(config.job)(config, run)


def run_job(config: Config) -> int:
    """Runs or continues a job and returns its exit code; under plan=true it tells what it would do."""
    if config.plan:
        plan = planned_job(config)
        if int(os.environ.get("RANK", 0)) == 0:
            print(plan.text)
        return 0
    run, job = make_run(config), named_job(config.job)
    path, resolved = run.path, OmegaConf.to_container(config, resolve=True)
    run.keep_config(resolved, ignoring=WATCHING, overwrite=config.run.overwrite)
    if config.tracker.log_with and getattr(job, "is_tracked", True) and not run.made(FINISHED):
        in_chain = (path.parent / "stages").is_dir()  # many runs cannot share one id
        given = None if in_chain else os.environ.get("WANDB_RUN_ID")  # by a W&B sweep's agent
        identity = run.json("tracker.json", lambda: {"id": given or secrets.token_hex(4)})  # a continued run keeps it
        with damaged(path / "tracker.json"):
            run_id = identity["id"]
        run.tracker = Tracker(run.accelerator, config.tracker, path, resolved, run_id)
    with logging_redirect_tqdm():
        code = job(config, run)
    if run.tracker:
        run.tracker.finish()
    return code


def unknown_keys(schema: DictConfig, config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Keys that a `+` added to the typed part of the configuration, where nothing would read them."""
    for key in config:
        if key not in schema:
            yield f"{prefix}{key}"
        elif is_dataclass(OmegaConf.get_type(schema, key)):
            yield from unknown_keys(schema[key], config[key], f"{prefix}{key}.")


def run_path(config: DictConfig) -> Path:
    """root/name; under a multirun root/name/<the swept overrides>. ValueError for a name that leaves root."""
    parts = Path(config.name).parts
    if not parts or Path(config.name).is_absolute() or ".." in parts:
        raise ValueError(f"name={config.name!r} must name a folder under root")
    path = Path(config.root) / config.name
    swept = HydraConfig.get().job.override_dirname.replace("/", "_")
    if HydraConfig.get().mode != RunMode.MULTIRUN or swept in Path(config.root).parts:  # as a chain's stage is already
        return path
    return path / swept


def list_experiments() -> None:
    """What there is to run, with the line each experiment file opens with."""
    print("Choose an experiment: accelerate launch train.py +experiment=NAME [key=value …]\n")
    for path in sorted((CONFIGS / "experiment").glob("*.yaml")):
        says = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ") and "@package" not in line]
        print(f"  {path.stem:<16} {says[0]}")
