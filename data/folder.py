"""Captions in a folder of images, in the layout of Hugging Face's imagefolder or as .txt files.

Any folder under the root may hold a metadata.jsonl, .csv or .parquet with a column file_name, relative to that folder,
and a caption column. Several rows may caption one image: each is a pair. An image that no row names takes the .txt file
beside it. An image without a caption, or a caption without its image, is a flaw, which the caller may pass over.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data.tables import caption_column, caption_text, csv_rows, json_rows, parquet_rows, read_text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
METADATA = {"metadata.jsonl": json_rows, "metadata.csv": csv_rows, "metadata.parquet": parquet_rows}


def read_folder(root: Path, column: str | None) -> tuple[list[tuple[str, str]], list[str]]:
    """(path under `root`, caption) of every pair in a folder, ordered by path; and what is no pair, and why."""
    if not root.is_dir():
        raise FileNotFoundError(f"image folder {root} {'is no folder' if root.exists() else 'does not exist'}")
    files = sorted(walk(root))
    images = [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    tables = [name for name in files if Path(name).name in METADATA]
    if not images:
        raise ValueError(f"image folder {root} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    known = set(files)
    captions: dict[str, list[str]] = {}
    flaws: list[str] = []
    for table in tables:
        read_metadata(root, table, column, known, captions, flaws)
    for name in images:
        text = str(Path(name).with_suffix(".txt"))
        if name in captions:
            continue
        if text not in known:
            flaws.append(f"{name} has no caption, in no metadata file and no .txt beside it")
            continue
        try:
            captions[name] = [caption_text(" ".join(read_text(root / text).split()), f"caption file {root / text}")]
        except ValueError as error:
            flaws.append(str(error))
    return [(name, caption) for name in sorted(captions) for caption in captions[name]], flaws


def walk(root: Path) -> Iterator[str]:
    """Every file under `root` as a path relative to it, hidden files and folders left out."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


def read_metadata(
    root: Path, table: str, column: str | None, known: set[str], captions: dict[str, list[str]], flaws: list[str]
) -> None:
    """Adds the captions of one metadata file to `captions` {path under root: texts}; rows that give none to `flaws`.

    Raises ValueError for a row without the columns.
    """
    path = root / table
    for where, row in METADATA[Path(table).name](path):
        source = f"{path}, {where},"
        file_name, text = row[caption_column(row, "file_name", source)], row[caption_column(row, column, source)]
        try:
            file_name = caption_text(file_name, f"{source} file_name")
            name = Path(os.path.normpath(Path(table).parent / file_name)).as_posix()
            if name not in known:
                raise ValueError(f"{source} names {file_name}, which is not in {path.parent}")
            captions.setdefault(name, [])
            captions[name].append(caption_text(text, f"{source} the caption of {file_name}"))
        except ValueError as error:
            flaws.append(str(error))


def few(names: list[str]) -> str:
    """The first three names, and a sign that there are more."""
    return "; ".join(names[:3]) + ("; …" if len(names) > 3 else "")
