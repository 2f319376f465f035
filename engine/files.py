"""Files and folders that are whole or absent: written under a temporary name, flushed, renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from yaml import YAMLError

from slimstep.engine.quiet import one_line

if TYPE_CHECKING:
    from torch import Tensor


def write_text(path: Path, text: str) -> None:
    """Replaces `path` in one step; a kill leaves the old file or the new one, never half of one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.aside")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=1) + "\n").encode()


def load_json(path: Path) -> Any:
    """A table or list that `write_json` wrote. ValueError, which names the file, where it is damaged or empty."""
    with damaged(path):
        value = json.loads(path.read_text())
        if not isinstance(value, (dict, list)) or not value:
            raise ValueError(f"it holds {value}")
        return value


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, readable for all (the library writes 0600), in one step."""
    from safetensors.torch import save_file  # here, since who writes other files does without torch

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.aside")
    with unwritable(aside):
        kept = None if metadata is None else dict(metadata)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, kept)
    aside.chmod(0o644)
    flush(aside)
    os.replace(aside, path)


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """A full disk is an OSError, also where safetensors and torch have errors of their own for it."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        raise OSError(f"{path} cannot be written: {one_line(error)}") from error


def flush(path: Path) -> None:
    """Has the file on the disk, so that a rename after it never uncovers an empty one."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The digest of every file under a folder, by its path within it; empty where there is no folder."""
    return {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` to write into, and renames it to `path` when the block ends well.

    What a killed writer left aside is removed first. An existing `path` is replaced.
    """
    aside = path.with_name(f".{path.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:  # SIGTERM and Ctrl-C, too, leave nothing half written aside; all go on from here
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for file in aside.rglob("*"):
        if file.is_file():
            flush(file)
    if path.exists():
        shutil.rmtree(path)
    os.rename(aside, path)


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """ValueError that names the file where what is in it cannot be read."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, YAMLError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the same command makes it again") from error
