"""From the command line to a job: the configuration, and one clear line for a mistake.

Nothing here imports torch or diffusers: listing, --help and a misspelt key answer at once.
"""

import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

from slimstep import ROOT
from slimstep.engine.checked import CONFIGS, USER_ERRORS, checked_config, run_path
from slimstep.engine.config import as_dict
from slimstep.engine.identity import existing_run, run_name
from slimstep.engine.launcher import check_launcher, is_on
from slimstep.engine.overrides import is_readable, parsed, quoted
from slimstep.engine.preemption import CONTINUE_ME, leave_on_sigterm, was_preempted
from slimstep.engine.quiet import bounded, one_line
from slimstep.engine.renamed import EXPERIMENTS, with_new_key
from slimstep.engine.tested import outside_the_tested_set

MULTIRUN = {"-m", "--multirun"}
ASKING = {  # what a job makes of own images: a workflow, which has no job, both
    "slimstep.eval.cache_job.cache_latents": ("model",),
    **dict.fromkeys(("slimstep.prune.job.prune_unet", "slimstep.prune.vae_job.prune_vae",
                     "slimstep.distill.job.distill_steps", "slimstep.eval.job.evaluate",
                     "slimstep.eval.speed_job.cumulative"), ("model", "scorer")),
}  # fmt: skip
log = logging.getLogger("slimstep")

OmegaConf.register_new_resolver("here", lambda path: str(ROOT / path), replace=True)
# In a workflow: an artifact of another stage, and the last of a list.
OmegaConf.register_new_resolver("made", lambda artifact, *, _root_: str(run_path(_root_) / artifact), replace=True)
OmegaConf.register_new_resolver("last", lambda values: values[-1], replace=True)

COMPOSE_ERRORS = (*USER_ERRORS, AssertionError, AttributeError)  # the last two where an override goes into a null key


def main() -> None:
    """Runs the experiment the command line names. Exit codes: 0, 1 for a mistake, 75 after SIGTERM, or the job's."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if not os.environ.get(name, "0").isdigit():
            fail(f"the environment's {name}={os.environ[name]} is no number; launchers set it, unset it otherwise")
    set_up()
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in MULTIRUN)  # argparse wants it first
    sys.argv[1:] = [with_new_key(argument) for argument in sys.argv[1:]]
    sys.argv[1:] = [quoted(argument, sweeps=bool(MULTIRUN & set(sys.argv))) for argument in sys.argv[1:]]
    # A stage's table names some of its keys; the others are added.
    sys.argv[1:] = [f"++{argument}" if argument.startswith("stages.") else argument for argument in sys.argv[1:]]
    config = check_overrides(sys.argv[1:])
    sys.argv += named_by_what_is_swept(sys.argv[1:])
    codes: list[int] = []  # a multirun goes on after a job that failed, and tells in the end

    def job(config: DictConfig) -> None:
        if "SUBMITIT_EXECUTOR" in os.environ:
            start_in_queue(config)
        else:
            codes.append(start(config))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what a sweep's folder or launcher does, and prints nothing
    try:
        if config is not None:
            run_one(config, job)
        else:
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
    if 1 not in codes and "torch" in sys.modules:
        from slimstep.engine.execution import leave_processes

        leave_processes()  # where a rank failed this could wait for it
    sys.exit(1 if 1 in codes else max(codes, default=0))


def run_one(config: DictConfig, job: Callable[[DictConfig], None]) -> None:
    """What hydra.main does for one job, with the configuration that is composed: it would do that twice more."""
    instance = HydraConfig.instance()
    before = instance.cfg
    config.hydra.mode = RunMode.RUN
    instance.set_config(config)
    with flag_override(config, ["struct", "readonly"], False):
        del config["hydra"]
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            job(config)
    finally:
        instance.cfg = before


def named_by_what_is_swept(arguments: list[str]) -> list[str]:
    """For a multirun, Hydra's own override that leaves out of a job's name what is the same in every job."""
    if not MULTIRUN & set(arguments):
        return []
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException:
        return []  # Hydra itself will say what is wrong
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    same = [override.key_or_group for override in parsed if override.key_or_group not in swept]
    return [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(same)}]"]


def set_up() -> None:
    """Rank 0 tells what is done, the others only what goes wrong."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    log.setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.ERROR)


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


def check_overrides(arguments: list[str]) -> DictConfig | None:
    """The configuration of one job, Hydra's own in it; None where Hydra's own commands or overrides ask for more.

    Leaves with one line that names the first override that does not fit, and the choices there are.
    """
    overrides = [first_of_sweep(argument) for argument in arguments if argument not in MULTIRUN]
    if any(override.startswith("-") for override in overrides):
        return None  # --help, --cfg: Hydra's own commands
    if len(sources := [override for override in overrides if override.startswith("data.source=")]) > 1:
        message = f"data.source is given {len(sources)} times, {sources[0]} first"
        fail(f"{message}: where a shell has written braces out, quote them, 'data.source=…{{000..127}}.tar'")
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            config = hydra.compose("train", overrides, return_hydra_config=True)
        except COMPOSE_ERRORS as error:
            fail(explain(error, overrides) if int(os.environ.get("RANK", 0)) == 0 else "")
    of_hydra = any(override.lstrip("+~").startswith("hydra") for override in overrides)
    return config if arguments == overrides and not of_hydra else None


def first_of_sweep(override: str) -> str:
    """The override with the first of its values where it sweeps over several; else as it is."""
    try:
        parsed_override = parsed(override)
    except HydraException:
        return override
    if not parsed_override.is_sweep_override():
        return override
    return f"{parsed_override.get_key_element()}={next(parsed_override.sweep_string_iterator())}"


def explain(error: Exception, overrides: list[str]) -> str:
    """Hydra's message in one line; where an override names a key that is not there, the keys that are."""
    if unreadable := [override for override in overrides if not is_readable(override)]:
        return grammar_error(unreadable[0])
    ordered = sorted(overrides, key=in_order)  # the experiment and the groups bring their keys
    fitting, failing = 0, len(ordered) + 1  # the first so many of them fit, and the first so many do not
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        try:
            hydra.compose("train", ordered[:middle])
            fitting = middle
        except COMPOSE_ERRORS as culprit:
            error, failing = culprit, middle
    if failing > len(ordered):
        return one_line(error)
    before, override = hydra.compose("train", ordered[:fitting]), ordered[fitting]
    parent, _, leaf = override.partition("=")[0].lstrip("+~").rpartition(".")
    section = OmegaConf.select(before, parent) if parent else before
    if parent and section is None:
        return f"{override}: {parent} is null; give it whole, as '{parent}={{{leaf}: …}}'"
    changes = override[:1] not in ("+", "~") and "/" not in leaf
    if changes and OmegaConf.is_dict(section) and leaf not in list(section):  # `in` passes over missing values
        if leaf == "experiment":
            return f"{override}: an experiment is added, +{override}"
        close = difflib.get_close_matches(leaf, map(str, section), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        where = parent or "the configuration"
        return f"{override}: {where} has no key {leaf!r}; {hint}keys: {', '.join(section)}"
    choices = sorted(path.stem for path in (CONFIGS / leaf).glob("*.yaml"))
    hint = f" (there are {', '.join(choices)})" if choices and "group" in str(error) else ""
    return f"{override}: {one_line(error.__cause__ or error)}{hint}"


def in_order(override: str) -> tuple[bool, bool]:
    """Sorts what is added before what is changed, and groups before keys."""
    return not override.startswith("+"), not (CONFIGS / override.partition("=")[0].lstrip("+~")).is_dir()


def grammar_error(override: str) -> str:
    """What is wrong with an override that Hydra's grammar has no place for, and how it is written."""
    key, equals, value = override.partition("=")
    if not override:
        return "an override is empty: write KEY=VALUE"
    if not equals:
        return f"{override} has no value: write {override}=VALUE"
    try:
        parsed(override)
    except HydraException as error:
        reason = one_line(error).partition(" See https")[0]
    if value[:1] in "'\"":
        return f"{override}: {reason}; quotes around a value are closed, and those within it have a \\ before them"
    way = "a text with one of = ( ) [ ] { } , : ; # ' \" in it has quotes of its own there"
    return f"{override}: {reason}; {way}: '{key.lstrip('+')}={{name: \"DIR=1\"}}', '{key.lstrip('+')}=[\"DIR (2)\"]'"


def fail(message: str) -> NoReturn:
    """Leaves with exit code 1; an empty message is for the ranks whose neighbour says the same."""
    if message:
        print(f"error: {bounded(message)}", file=sys.stderr)
    sys.exit(1)


def start(config: DictConfig) -> int:
    """Runs one job and returns its exit code, 1 after a mistake."""
    if config.job is None and not config.stages:
        list_experiments()
        requested = HydraConfig.get().overrides.task
        if requested:
            print(f"error: {bounded(' '.join(requested))} names no experiment; add +experiment=NAME", file=sys.stderr)
        return int(bool(requested))
    try:
        checked = named(checked_config(config))
        check_chosen(checked)
        check_text_length(checked)
        check_launcher(os.environ, checked)
    except USER_ERRORS as error:  # the same on every rank, and printed by one
        if config.debug:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {one_line(error)}  (debug=true shows where)", file=sys.stderr)
        return 1
    if is_on(os.environ, "ACCELERATE_USE_CPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else only what goes through accelerate would keep off the GPU
    log.info(f"{run_path(checked)}: loading the libraries")
    if others := outside_the_tested_set():
        log.warning(others)
    from slimstep.engine.execution import execute  # torch and diffusers take seconds, which a mistake need not wait for

    if "SUBMITIT_EXECUTOR" not in os.environ:
        leave_on_sigterm()  # not before: a library that is being imported may swallow what the handler raises
    return execute(checked)


def named(config: DictConfig) -> DictConfig:
    """The configuration with the name of its run, where the command line gives none: that of the run which it began, or
    one that says what the command changes (engine/identity.py)."""
    overrides = [parsed(override) for override in HydraConfig.get().overrides.task]
    keys = {override.key_or_group for override in overrides}
    if config.stages or "name" in keys or "experiment" not in keys:
        return config
    below = ""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        same = HydraConfig.get().job.config.override_dirname.exclude_keys
        overrides, below = [override for override in overrides if override.key_or_group in same], run_path(config).name
    content = as_dict(config)
    defaults = (config.name, *(old for old, new in EXPERIMENTS.items() if new == config.name))
    runs = (existing_run(Path(config.root), default, below, content) for default in defaults)
    config.name = next(filter(None, runs), None) or run_name(config.name, overrides)
    return config


DRAWN = ("slimstep.data.shapes.ShapesPairs", "slimstep.data.shapes_video.ShapesVideoPairs")


def check_chosen(config: DictConfig) -> None:
    """ValueError for own images or prompts without a word of the model and the scorer: those that stand where none is
    named know drawn shapes alone, and what they make and say of photographs is noise."""
    keys = {parsed(override).key_or_group for override in HydraConfig.get().overrides.task}
    asks: Sequence[str] = ASKING.get(str(config.job), () if config.job else ("model", "scorer"))
    asks = [part for part in asks if part != "scorer" or config.scorer]  # some experiments take none
    if OmegaConf.select(config.data, "pairs._target_") not in DRAWN:
        chosen_data = f"data={HydraConfig.get().runtime.choices.get('data')}"
    else:
        chosen_data, asks = f"data.prompt_file={config.data.prompt_file}", [part for part in asks if part == "scorer"]
        if config.data.prompt_file is None:
            return
    chosen = {"model": {"model", "model.name_or_path", "model._target_"} | ({"models"} if config.models else set()),
              "scorer": {"scorer", "scorer.model", "scorer._target_"}}  # fmt: skip
    if absent := [part for part in asks if not keys & chosen[part]]:
        ways = {"model": "model=sd15", "scorer": "scorer=openclip"}
        raise ValueError(
            f"{chosen_data} wants {' and '.join(f'{part}=' for part in absent)} beside it, as "
            f"{' '.join(ways[part] for part in absent)}: what is taken where none is named knows drawn shapes alone "
            f"({' '.join(f'{part}=shapes' for part in absent)} takes it nevertheless)"
        )


def check_text_length(config: DictConfig) -> None:
    """ValueError for another model in the place of a bundled one that cuts prompts, without a word of the length."""
    keys = {parsed(override).key_or_group for override in HydraConfig.get().overrides.task}
    if "model.name_or_path" not in keys or keys & {"model", "model.max_sequence_length"}:
        return
    if length := config.model.get("max_sequence_length"):
        model, path = HydraConfig.get().runtime.choices.get("model"), config.model.name_or_path
        raise ValueError(
            f"model.name_or_path={path} stands in the place of model={model}, which cuts prompts to "
            f"model.max_sequence_length={length}: give model=path beside it, or model={model} for one of its kind"
        )


def list_experiments() -> None:
    """What there is to run, with the line each experiment file opens with."""
    print("Choose an experiment: accelerate launch train.py +experiment=NAME [key=value …]\n")
    for path in sorted((CONFIGS / "experiment").glob("*.yaml")):
        says = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ") and "@package" not in line]
        print(f"  {path.stem:<16} {says[0]}")
