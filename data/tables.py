"""Captions in tables: the rows of .jsonl, .csv, .tsv and .parquet files, and which of their columns is the caption.

COCO's captions come as one JSON document of their own kind: one caption per image is read from it.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import pyarrow
from pyarrow import parquet

CAPTION_COLUMNS = ("text", "caption", "prompt")
DAMAGE = (pyarrow.ArrowException, OSError, UnicodeDecodeError)  # of parquet files, as pyarrow tells it


def caption_column(columns: Iterable[str], column: str | None, source: str) -> str:
    """The caption column among `columns`: the one asked for, or the only one named text, caption or prompt."""
    columns = list(columns)
    if column is not None:
        if column not in columns:
            raise ValueError(f"{source} has no column {column!r}; its columns are {', '.join(columns)}")
        return column
    known = [c for c in columns if c.lower() in CAPTION_COLUMNS]
    if len(known) != 1:
        raise ValueError(
            f"{source} has {'several' if known else 'none'} of the caption columns {', '.join(CAPTION_COLUMNS)}; "
            f"name the one to use, its columns are {', '.join(columns)}"
        )
    return known[0]


def read_text(path: Path) -> str:
    """The file as UTF-8, without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """("line 3", {…}) of a .jsonl file; blank lines between rows are passed over, as Hugging Face datasets does."""
    # split, not splitlines: the latter also cuts at the line separators that JSON allows inside strings.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            told = getattr(error, "msg", error)
            raise ValueError(f"{path}, line {number} is not JSON ({told}): {line[:60]!r}") from None
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number} is not a JSON object such as {{"text": "…"}}: {line[:60]!r}')
        yield f"line {number}", row


def coco_rows(path: Path) -> Iterator[tuple[str, str]]:
    """("annotation 49", caption) of a COCO captions file: per image the caption of lowest id, images by their id.

    Images without a caption are passed over.
    """
    try:
        coco = json.loads(read_text(path))
        listed = {image["id"] for image in coco["images"]}
        captions = [(row["image_id"], row["id"], row["caption"]) for row in coco["annotations"]]
        ordered = sorted(row for row in captions if row[0] in listed)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({getattr(error, 'msg', error)})") from None
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is no COCO captions file, {{"images": [{{"id": …}}], "annotations": [{{"image_id": …, "id": …, '
            f'"caption": …}}]}}: {type(error).__name__} {error}; one JSON object per line is .jsonl'
        ) from None
    for _, rows in groupby(ordered, key=lambda row: row[0]):
        _, number, caption = next(rows)
        yield f"annotation {number}", caption


def csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """("line 2", {…}) of a .csv or .tsv file with a header; a quoted field may span lines, the last one is named."""
    lines = io.StringIO(read_text(path), newline="")  # splitlines would also cut at separators inside texts
    reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {reader.line_num} has more fields than the header; quote texts")
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is no line of a table: {error}") from None


def parquet_rows(path: Path, columns: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """("row 1", {…}) of a .parquet file, read batch by batch."""
    file = open_parquet(path)
    rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
    try:
        for number, row in enumerate(rows, 1):
            yield f"row {number}", row
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def parquet_columns(path: Path) -> list[str]:
    return open_parquet(path).schema_arrow.names


def open_parquet(path: Path, file: BinaryIO | None = None) -> parquet.ParquetFile:
    """The file at `path`, or `file`, which came from there."""
    try:
        return parquet.ParquetFile(file or path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read as a parquet file: {str(error).splitlines()[0]}") from None


def caption_text(value: object, source: str) -> str:
    """A caption cell as text; of several captions in one cell the first. Raises ValueError, with `source`, if empty."""
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{source} is empty or no text ({value!r}); give it a text or delete it")
    if not value.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{source} holds half a surrogate pair ({value!r}), which is no text")
    return value.strip()
