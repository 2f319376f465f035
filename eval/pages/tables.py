"""Tables as text: Markdown for files, and for a terminal what fits its width."""

import csv
import io
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from slimstep.eval.pages.text import leaves

NOTHING = {"", "–"}
WIDTH = 120  # where no terminal says its own


@dataclass(frozen=True)
class Table:
    """Cells with their headings; the first `labels` columns name a row. CSS classes of whole rows, or of every cell,
    where they have some."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1
    title: str = ""
    note: str = ""
    row_classes: Sequence[str] = ()
    cell_classes: Sequence[Sequence[str]] = ()

    @classmethod
    def of(cls, columns: Mapping[str, Callable[[Any], str]], things: Iterable[Any], **options: Any) -> Self:
        """A row for each thing; columns: {heading: what it shows of a thing}."""
        return cls(list(columns), [[cell(thing) for cell in columns.values()] for thing in things], **options)

    @property
    def markdown(self) -> str:
        return markdown_table(self.header, self.rows)

    @property
    def console(self) -> str:
        return console_table(self.header, self.rows, self.labels)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns padded so that it reads in a terminal too."""
    widths = [max(len(line[k]) for line in (header, *rows)) for k in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in (header, *rows)]
    rule = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])) + "\n"


def console_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1, width: int | None = None
) -> str:
    """The table in lines of `width` characters, the terminal's own width if None.

    Columns that say nothing, or the same of all of several rows, are said once above, and what does not fit goes on
    below, beside the first `labels` columns once more. A single column may be wider than a line.
    """
    width = width or shutil.get_terminal_size((WIDTH, 0)).columns
    values = {k: {row[k] for row in rows} for k in range(len(header))}
    empty = [k for k in values if rows and values[k] <= NOTHING]
    constant = [k for k in values if k not in empty and len(rows) > 1 and len(values[k]) == 1]
    above = [f"{header[k]}: {rows[0][k]}" for k in constant]
    if empty:
        above.append(f"nothing to show: {', '.join(header[k] for k in empty)}")
    varied = [k for k in values if k not in (*empty, *constant)]
    names = [k for k in varied if k < labels]
    blocks = [markdown_table([header[k] for k in block], [[row[k] for k in block] for row in rows])
              for block in fitting(names, varied[len(names) :], header, rows, width)]  # fmt: skip
    return "\n".join([*((lines(above, width),) if above else ()), *blocks])


def fitting(names: list[int], others: list[int], header, rows, width: int) -> Iterator[list[int]]:
    """`others` in as few blocks as have room beside `names`."""
    wide = {k: 3 + max(len(line[k]) for line in (header, *rows)) for k in (*names, *others)}  # "| " and " "
    block = list(names)
    for k in others:
        if len(block) > len(names) and 1 + sum(wide[column] for column in block) + wide[k] > width:
            yield block
            block = list(names)
        block.append(k)
    if block:
        yield block


def lines(facts: Sequence[str], width: int) -> str:
    """Facts one after the other, in lines of `width` characters; one that is longer goes on below."""
    text = [""]
    for fact in facts:
        joined = f"{text[-1]}; {fact}" if text[-1] else fact
        text[-1:] = [joined] if len(joined) < width or not text[-1] else [f"{text[-1]};", fact]
    return "\n".join(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in text) + "\n"


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Nested tables as CSV, one per line, columns named by dotted paths."""
    table = [dict(leaves(row)) for row in rows]
    columns = list(dict.fromkeys(key for line in table for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
