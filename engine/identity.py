"""Which run a command is about: the one whose configuration it has, or a new one named by what the command changes.

    +experiment=prune_unet                                   runs/prune_unet
    +experiment=prune_unet search.target_fraction=0.6        runs/prune_unet-target_fraction-0.6
    +experiment=distill_steps distillation.student=a/b/export      runs/distill_steps-student-b-5f3a91c2

A name is letters, digits and `._+-`, so that it needs no quotes in the next command. What a name leaves out of a value
(folders of a path, the end of a long one) is in the hash at its end. A workflow has the name that its experiment says:
its stages are compared one by one, and what is changed in one of them has to find the others.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from glob import escape
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override

from slimstep.engine.overrides import as_typed
from slimstep.engine.renamed import is_same, with_new_names

SCORER_CHECK = "scorer_check.json"  # what eval/scorer_check.py has measured
GROWING = ("distillation.steps", "curves.steps", "curves.guidance")
# A run may be continued with other values of these: they change how it is watched, or where and whether a cache can be
# made, not what comes out.
WATCHING = (
    "debug", "threads", "tracker", "run", "plan", "rates", "data.max_broken", "data.pairs.max_broken",
    "data.prompts.pairs.max_broken", "data.cache.folder", "data.cache.verify", "data.cache.workers", "scorer.force",
)  # fmt: skip
NAMELESS = ("experiment", "name", "root", "restart", "stages", "hydra", *WATCHING)
NOT_MADE = ("config.yaml", "tracker.json", "wandb", "tensorboard", "metrics.jsonl", "partial", "traceback-rank-",
            SCORER_CHECK)  # fmt: skip
LONGEST, OF_A_VALUE, DIGITS = 80, 32, 8  # characters


def run_name(default: str, overrides: Iterable[Override]) -> str:
    """The experiment's name and what the overrides change in it, in an order of its own."""
    changes = {override.key_or_group: override for override in overrides if not under(override.key_or_group, NAMELESS)}
    ends = Counter(re.split(r"[./]", key)[-1] for key in changes)
    parts, lossy = [default], False
    for key, override in sorted(changes.items()):
        leaf = re.split(r"[./]", key)[-1]
        text, cut = plain(override)
        if default.endswith(f"_{text}"):
            continue  # a budget that says so in the name
        parts += [leaf if ends[leaf] == 1 else key.replace("/", ".")] + ([text] if text else [])
        lossy |= cut
    name = "-".join(parts)
    if not lossy and len(name) <= LONGEST:
        return name
    whole = "\n".join(f"{key}={value_text(override)}" for key, override in sorted(changes.items()))
    return f"{name[: LONGEST - DIGITS - 1].rstrip('-_.')}-{hashlib.sha256(whole.encode()).hexdigest()[:DIGITS]}"


def under(key: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted key, or a group, is one of some, or below it."""
    return f"{key.replace('/', '.')}.".startswith(tuple(f"{prefix}." for prefix in prefixes))


def value_text(override: Override) -> str:
    """What stands behind the equals sign, without quotes around all of it."""
    if override.is_delete():
        return "none"
    text = as_typed(override).partition("=")[2].strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def plain(override: Override) -> tuple[str, bool]:
    """A value in the letters of a name, and whether some of it is lost: of a path the last folder that says something
    stands for it, of a long value its beginning."""
    text = value_text(override)
    lossy = bool(re.search(r"[^A-Za-z0-9._+,\[\] -]", text))
    if "/" in text and text[0] not in "[{":
        folders = [part for part in text.split("/") if part.strip(".") and part != "export"]
        text = folders[-1] if folders else text
    letters = re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("_-")
    return letters[:OF_A_VALUE].rstrip("_-."), lossy or len(letters) > OF_A_VALUE


def existing_run(root: Path, default: str, below: str, config: dict[str, Any]) -> str | None:
    """The name of the run under `root` that has this configuration and has begun: `default`, or one derived from it.

    `below` is the folder of a sweep's job in it. Lists of GROWING may have more at their end than they had.
    """
    folders = [root / default, *sorted(root.glob(f"{escape(default)}-*"))]
    for folder in folders:
        if ".before-" not in folder.name and has_begun(folder / below) and is_of(folder / below, config):
            return folder.name if "/" not in default else f"{default.rpartition('/')[0]}/{folder.name}"
    return None


def has_begun(folder: Path) -> bool:
    """Whether something was made here that belongs to a configuration."""
    return (folder / "config.yaml").exists() and any(not p.name.startswith(NOT_MADE) for p in folder.iterdir())


def is_of(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the run in `folder` was made by this configuration; the name does not matter."""
    try:
        existing = yaml.load((folder / "config.yaml").read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    if not isinstance(existing, dict):
        return False
    pairs = differences(existing, config)
    return all(under(key, ("name", *WATCHING)) or has_grown(key, *pair) for key, pair in pairs.items())


def has_grown(key: str, old: Any, new: Any) -> bool:
    """Whether a value is a list that may be continued, and was."""
    return key in GROWING and isinstance(old, list) and isinstance(new, list) and new[: len(old)] == old


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old, new)} of all leaves in which two nested dicts differ; None stands for a missing one."""
    if not prefix:
        old = with_new_names(old)
    tables = [value for value in (old, new) if isinstance(value, dict)]
    if not tables or not all(value is None or isinstance(value, dict) for value in (old, new)):
        return {} if is_same(prefix, old, new) else {prefix: (old, new)}
    old, new = old or {}, new or {}
    differing: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        differing |= differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    return differing
