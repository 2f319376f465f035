"""Captions in a folder of images or videos, in the layout of Hugging Face's imagefolder or as .txt files.

Any folder under the root may hold a metadata.jsonl, .csv or .parquet with a column file_name, relative to that folder,
and a caption column. Several rows may caption one image: each is a pair. An image that no row names takes the .txt file
beside it. An image without a caption, or a caption without its image, is a flaw, which the caller may pass over. What
is said of images holds of videos: of files, or of folders of frames, each of which is one and has its .txt beside it.

Links to folders are followed, and no folder is read twice: a link to one that is read anyway, or that the root lies in,
is passed over. An image of several names (links again) belongs to one split under all of them.
"""

import heapq
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from slimstep.data.tables import (
    caption_column,
    caption_text,
    csv_rows,
    existing_column,
    json_rows,
    parquet_rows,
    read_text,
)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
METADATA = {"metadata.jsonl": json_rows, "metadata.csv": csv_rows, "metadata.parquet": parquet_rows}


@dataclass
class Contents:
    """What a folder holds: (path under the root, caption) of every pair, ordered by path; `flaws`, what is no pair and
    why; `passed_over`, links and folders that are not read and why; {path: first path} of pairs, which are the same for
    an image of several names; {path: paths of its frames} of videos that are folders.
    """

    pairs: list[tuple[str, str]]
    flaws: list[str]
    passed_over: list[str]
    first_names: dict[str, str]
    frames: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Tree:
    """The files under a root, {path under it: real path}, hidden ones left out; `dead` links lead to nothing."""

    files: dict[str, str] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


def read_folder(
    root: Path, column: str | None, kind: str = "image", suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> Contents:
    """The pairs in a folder. Of videos, where there is no file of one, every folder that holds images is a video.

    Raises FileNotFoundError or ValueError for a missing root, no images, an unknown column, and an image that two
    metadata files caption."""
    if not root.is_dir():
        raise FileNotFoundError(f"{kind} folder {root} {'is no folder' if root.exists() else 'does not exist'}")
    tree = walk(root)
    names = sorted(tree.files)
    images = [name for name in names if has_suffix(name, suffixes)]
    frames: dict[str, list[str]] = {}
    if kind == "video" and not images:
        suffixes = IMAGE_SUFFIXES
        for name in filter(is_image, names):
            frames.setdefault(str(Path(name).parent), []).append(name)
        images = sorted(frames.keys() - {"."})
    if not images:
        sought = ", ".join(suffixes) if kind == "image" else f"{', '.join(VIDEO_SUFFIXES)}, or folders of frames"
        raise ValueError(f"{kind} folder {root} holds no {kind}s ({sought})")
    flaws = [f"{name} is a link to nothing" for name in tree.dead if has_suffix(name, suffixes)]
    passed_over = tree.passed_over + [
        f"{name} (a link to nothing)" for name in tree.dead if not has_suffix(name, suffixes)
    ]
    captions: dict[str, list[str]] = {}
    captioned_by: dict[str, Path] = {}
    for table in (name for name in names if Path(name).name in METADATA):
        for name, text in metadata_rows(root, table, column, frames or tree.files, flaws):
            if (other := captioned_by.setdefault(name, root / table)) != root / table:
                raise ValueError(f"{other} and {root / table} both caption {name}: keep one of the two files")
            captions.setdefault(name, []).extend([text] if text else [])
    for name in images:
        text = f"{name}.txt" if frames else str(Path(name).with_suffix(".txt"))
        if name in captions:
            continue
        if text not in tree.files:
            flaws.append(f"{name} has no caption, in no metadata file and no .txt beside it")
            continue
        try:
            captions[name] = [caption_text(" ".join(read_text(root / text).split()), f"caption file {root / text}")]
        except ValueError as error:
            flaws.append(str(error))
    pairs = [(name, caption) for name in sorted(captions) for caption in captions[name]]
    first = {name: name for name in frames} or first_names(root, tree.files)
    return Contents(pairs, flaws, passed_over, first, frames)


def is_image(name: str) -> bool:
    return has_suffix(name, IMAGE_SUFFIXES)


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    return Path(name).suffix.lower() in suffixes


def walk(root: Path) -> Tree:
    """Every folder is read once, under its own place where that is under the root, else under its first link."""
    tree, home, read = Tree(), os.path.realpath(root), set()
    waiting = [(False, "", home)]  # whether links led there, the path under the root, the real one
    while waiting:
        is_linked, folder, real = heapq.heappop(waiting)
        if real in read:
            tree.passed_over.append(f"{folder} ({real} is read already)")
            continue
        read.add(real)
        try:
            entries = list(os.scandir(real))
        except PermissionError:
            tree.passed_over.append(f"{folder} (it may not be read)")
            continue
        for entry in entries:
            is_link, name = entry.is_symlink(), f"{folder}{entry.name}"
            target = os.path.realpath(entry.path) if is_link else entry.path
            if entry.name.startswith("."):
                continue
            if os.path.isdir(target) if is_link else entry.is_dir():
                if is_link and os.path.commonpath([target, home]) == target:
                    tree.passed_over.append(f"{name} ({root} lies in {target})")
                else:
                    heapq.heappush(waiting, (is_linked or is_link, f"{name}/", target))
            elif is_link and not os.path.exists(target):
                tree.dead.append(name)
            else:
                tree.files[name] = target
    return tree


def first_names(root: Path, files: dict[str, str]) -> dict[str, str]:
    """{path: the first path of the same file}, a file's own place before links to it."""
    home, names = os.path.realpath(root), {}
    for name in sorted(files, key=lambda name: (files[name] != os.path.join(home, name), name)):
        names.setdefault(files[name], name)
    return {name: names[real] for name, real in files.items()}


def metadata_rows(
    root: Path, table: str, column: str | None, files: Collection[str], flaws: list[str]
) -> Iterator[tuple[str, str | None]]:
    """(path under root, caption) of every row of a metadata file whose image is there; no caption where it is none.
    What is no pair is added to `flaws`.

    Raises ValueError for a row without the columns.
    """
    path = root / table
    for where, row in METADATA[Path(table).name](path):
        source = f"{path}, {where},"
        file_name, text = row[existing_column(row, "file_name", source)], row[caption_column(row, column, source)]
        name = None
        try:
            file_name = caption_text(file_name, f"{source} file_name")
            place = Path(os.path.normpath(Path(table).parent / file_name)).as_posix()
            if place not in files:
                raise ValueError(f"{source} names {file_name}, which is not in {path.parent}")
            name = place
            yield name, caption_text(text, f"{source} the caption of {file_name}")
        except ValueError as error:
            flaws.append(str(error))
            if name:
                yield name, None


def few(names: list[str]) -> str:
    """The first three names, and a sign that there are more."""
    return "; ".join(names[:3]) + ("; …" if len(names) > 3 else "")
