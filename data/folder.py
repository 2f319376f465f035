"""Captions in a folder of images, in the layout of Hugging Face's imagefolder or as .txt files.

Any folder under the root may hold a metadata.jsonl, .csv or .parquet with a column file_name, relative to that folder,
and a caption column. Several rows may caption one image: each is a pair. An image that no row names takes the .txt file
beside it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data.tables import caption_column, caption_text, csv_rows, json_rows, parquet_rows, read_text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
METADATA = {"metadata.jsonl": json_rows, "metadata.csv": csv_rows, "metadata.parquet": parquet_rows}


def read_folder(root: Path, column: str | None) -> list[tuple[str, str]]:
    """(path under `root`, caption) of every pair in a folder, ordered by path."""
    if not root.is_dir():
        raise FileNotFoundError(f"image folder {root} {'is no folder' if root.exists() else 'does not exist'}")
    files = sorted(walk(root))
    images = [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    tables = [name for name in files if Path(name).name in METADATA]
    if not images:
        raise ValueError(f"image folder {root} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    known = set(files)
    captions: dict[str, list[str]] = {}
    for table in tables:
        read_metadata(root, table, column, known, captions)
    texts = {name: str(Path(name).with_suffix(".txt")) for name in images if name not in captions}
    bare = [name for name, text in texts.items() if text not in known]
    if bare:
        raise ValueError(
            f"{len(bare)} of {len(images)} images in {root} have no caption: {few(bare)}; give each a row in "
            "metadata.jsonl or a .txt file beside it, or take it away"
        )
    for name, text in texts.items():
        captions[name] = [caption_text(" ".join(read_text(root / text).split()), f"caption file {root / text}")]
    return [(name, caption) for name in sorted(captions) for caption in captions[name]]


def walk(root: Path) -> Iterator[str]:
    """Every file under `root` as a path relative to it, hidden files and folders left out."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


def read_metadata(root: Path, table: str, column: str | None, known: set[str], captions: dict[str, list[str]]) -> None:
    """Adds the captions of one metadata file to `captions` {path under root: texts}."""
    path, missing, rows = root / table, [], 0
    for where, row in METADATA[Path(table).name](path):
        rows += 1
        source = f"{path}, {where},"
        file_name = caption_text(row[caption_column(row, "file_name", source)], f"{source} file_name")
        text = row[caption_column(row, column, source)]
        name = Path(os.path.normpath(Path(table).parent / file_name)).as_posix()
        if name not in known:
            missing.append(file_name)
        captions.setdefault(name, []).append(caption_text(text, f"{source} the caption of {file_name}"))
    if missing:
        raise ValueError(
            f"{len(missing)} of {rows} captions in {path} name images that are not there: {few(missing)}; "
            f"add the images or delete the rows (file_name is relative to {path.parent})"
        )


def few(names: list[str]) -> str:
    """The first three names, and a sign that there are more."""
    return "; ".join(names[:3]) + ("; …" if len(names) > 3 else "")
