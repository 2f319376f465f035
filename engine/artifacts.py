"""What a stage of a workflow has made: its files, their digests, and which artifacts are not what they were."""

from functools import cache
from pathlib import Path
from typing import Any

from slimstep.engine.files import digest

NOT_KEPT = ("wandb", "tensorboard")  # trackers add to theirs at any time
CARD = "README.md"  # of an export: written anew with every result, and edited by whoever hands it on


def seen(folder: Path) -> dict[str, str]:
    """The digest of every file of an artifact, each read once in a process: weights are large, and many read them."""
    stats = {path: path.stat() for path in files_of(folder)}
    return {str(p.relative_to(folder)): known_digest(p, s.st_size, s.st_mtime_ns) for p, s in stats.items()}


def files_of(folder: Path) -> list[Path]:
    """All but what trackers keep, and model cards; a file is its own."""
    if folder.is_file():
        return [folder]
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CARD)
    return [path for path in files if path.relative_to(folder).parts[0] not in NOT_KEPT]


@cache
def known_digest(path: Path, size: int, changed_ns: int) -> str:
    return digest(path)


def changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The artifacts that are not what they were."""
    return ", ".join(artifact for artifact in {**before, **now} if before.get(artifact) != now.get(artifact))
