"""Captions in tables: the rows of .jsonl, .csv, .tsv and .parquet files, and which of their columns is the caption.

COCO's captions come as one JSON document of their own kind: one caption per image is read from it. A row of a .tsv is
one line, as the format has it, and a row of a .csv may span several, as quotes say.
"""

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby, zip_longest
from pathlib import Path
from typing import BinaryIO

import pyarrow
from pyarrow import parquet

CAPTION_COLUMNS = ("text", "caption", "prompt")
DAMAGE = (pyarrow.ArrowException, OSError, UnicodeDecodeError)  # of parquet files, as pyarrow tells it
log = logging.getLogger("slimstep")
warn_once = cache(log.warning)  # a file is read for each split


def caption_column(columns: Iterable[str], column: str | None, source: str, key: str = "data.caption_column") -> str:
    """The caption column among `columns`: the one asked for, or the only one named text, caption or prompt.

    `key` is the configuration's, which names the column.
    """
    columns = list(columns)
    if column is not None:
        return existing_column(columns, column, source, key)
    known = [c for c in columns if c.lower() in CAPTION_COLUMNS]
    if len(known) != 1:
        raise ValueError(
            f"{source} has {'several' if known else 'none'} of the caption columns {', '.join(CAPTION_COLUMNS)}; "
            f"name the one to use, {key}=…, its columns are {', '.join(columns)}"
        )
    return known[0]


def existing_column(columns: Iterable[str], column: str, source: str, key: str | None = None) -> str:
    """`column`. ValueError where `columns` lack it; `key` is the configuration's that names another."""
    if column not in columns:
        way = f": {key}=… names another" if key else ""
        raise ValueError(f"{source} has no column {column!r}; its columns are {', '.join(columns)}{way}")
    return column


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
            reason = getattr(error, "msg", error)
            raise ValueError(f"{path}, line {number} is not JSON ({reason}): {line[:60]!r}") from None
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
    """("line 2", {…}) of a .csv file with a header; a quoted field may span lines, the last one is named.

    Raises ValueError for a quote that is not closed, or closed within a text; rows that seem to lie inside a quoted
    text are reported in the log.
    """
    lines = io.StringIO(read_text(path), newline="")  # splitlines would also cut at separators inside texts
    reader, last = csv.reader(lines, strict=True), 0
    header: list[str] = []
    try:
        for row in reader:
            first, last = last + 1, reader.line_num
            if not header:
                header = checked_header(row, path)
            elif row:
                if last > first:
                    tell_swallowed(row, header, path, first, last)
                yield f"line {last}", as_row(row, header, path, last)
    except csv.Error as error:
        way = "a quote inside a text is written twice, and the text stands in quotes"
        where = f"line {last + 1}" if reader.line_num == last + 1 else f"the text from line {last + 1} on"
        raise ValueError(f"{path}, {where} is no row of a table: {error}; {way}") from None


def tsv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """("line 2", {…}) of a .tsv file with a header: every line is a row (IANA, text/tab-separated-values).

    A field in quotes is read as CSV writers mean it, where the line's fields are then as many as the header's; any
    other quote is a letter. Raises ValueError where a line lacks fields and it, or the one before, opens a quote: a
    text of several lines, as a .csv may have.
    """
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    header, before = [], ""
    for number, line in enumerate(lines, 1):
        if not header:
            header = checked_header(unquoted(line, 0), path) if line else []
        elif line:
            fields = unquoted(line, len(header))
            if len(fields) < len(header) and (opens_quote(line) or opens_quote(before)):
                message = f"{path}, line {number} has fewer fields than the header, and a quote is open"
                raise ValueError(f"{message}: a row of a .tsv is one line; texts of several lines need a .csv")
            yield f"line {number}", as_row(fields, header, path, number)
        before = line


def opens_quote(line: str) -> bool:
    """Whether a field of a line begins with a quote that is not closed in the line."""
    try:
        list(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error as error:
        return "end of data" in str(error)
    return False


def unquoted(line: str, width: int) -> list[str]:
    """The fields of a line of a .tsv; `width` is how many there should be."""
    plain = line.split("\t")
    if '"' not in line:
        return plain
    try:
        (quoted,) = csv.reader([line], delimiter="\t", strict=True)
    except csv.Error:
        return plain
    return plain if len(plain) == width != len(quoted) else quoted


def checked_header(names: list[str], path: Path) -> list[str]:
    """The names of the columns. ValueError for one that is there twice."""
    if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        raise ValueError(f"{path} has several columns {twice[0]!r}; rename or delete all but one")
    return names


def as_row(fields: Sequence[str], header: Sequence[str], path: Path, number: int) -> dict:
    """{column: field}; None where the line has fewer."""
    if len(fields) > len(header):
        raise ValueError(f"{path}, line {number} has more fields than the header; quote texts")
    return dict(zip_longest(header, fields))


def tell_swallowed(row: Sequence[str], header: Sequence[str], path: Path, first: int, last: int) -> None:
    """A warning where a line inside a quoted text would be a whole row by itself."""
    inner = [line for field in row for line in field.splitlines()[1:]]
    if any(len(next(csv.reader([line]), ())) == len(header) for line in inner):
        warn_once(f"{path}: lines {first} to {last} are one row, by its quotes; if they are several, a quote is open")


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
