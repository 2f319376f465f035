"""Tables as text."""

import json

import pytest

from slimstep.eval.pages.speed_page import console_text
from slimstep.eval.pages.tables import console_table, lines, markdown_table
from tests.eval.results_stub import write_benchmark, write_cumulative, write_pipelines

HEADER = ["model", "steps", "batch", "× base", "ms", "memory", "graphs", "text encoder", "UNet"]
ROWS = [
    ["teacher", "50", "1", "1.18 [0.98, 1.34]", "1963", "–", "0", "2.72", "1833"],
    ["teacher", "8", "1", "1.03 [0.95, 1.10]", "358", "–", "0", "4.16", "505"],
    ["student", "8", "1", "0.84 [0.83, 1.23]", "257", "–", "0", "3.29", "243"],
]


def cells(text: str) -> list[set[str]]:
    """The cells of every line of a table, rules left out."""
    return [{cell.strip() for cell in line.strip("|").split("|")} for line in text.splitlines() if "---" not in line]


@pytest.mark.parametrize("width", [40, 60, 80, 120, 400])
def test_a_table_for_a_terminal_fits_it_and_loses_nothing(width):
    text = console_table(HEADER, ROWS, labels=2, width=width)
    assert max(map(len, text.splitlines())) <= width
    shown = set().union(*cells(text))
    assert " ".join(text.split("\n\n")[0].split()) == "batch: 1; graphs: 0; nothing to show: memory"
    for row in ROWS:
        assert {cell for k, cell in enumerate(row) if HEADER[k] not in ("batch", "memory", "graphs")} <= shown
    blocks = text.split("\n\n")[1:]
    assert all({"model", "steps"} <= cells(block)[0] for block in blocks)
    assert [len(cells(block)) for block in blocks] == [4] * len(blocks)


def test_as_few_blocks_as_have_room():
    assert len(console_table(HEADER, ROWS, labels=2, width=400).split("\n\n")) == 2
    alone = console_table(HEADER, ROWS, labels=2, width=1).split("\n\n")[1:]
    assert len(alone) == 4 and all(len(cells(block)[0]) == 3 for block in alone)


def test_of_a_single_row_only_what_says_nothing_is_left_out():
    columns = [k for k in range(len(HEADER)) if HEADER[k] != "memory"]
    table = markdown_table([HEADER[k] for k in columns], [[ROWS[0][k] for k in columns]])
    assert console_table(HEADER, ROWS[:1], 2, 400) == f"nothing to show: memory\n\n{table}"


def test_equal_rows_are_said_once():
    assert console_table(["model", "ms"], [["a", "1"], ["a", "1"]], 1, 80) == "model: a; ms: 1\n"


def test_without_rows_the_header_stays():
    assert console_table(["model", "ms"], [], 1, 80) == markdown_table(["model", "ms"], [])


@pytest.mark.parametrize("width", range(10, 40))
def test_facts_fit_as_well(width):
    assert max(map(len, lines(["batch: 1", "calls: 3", "ms: 20", "a: b"], width).splitlines())) <= width


NAMES = {"benchmark": ["model", "steps", "batch", "name"], "cumulative": ["name", "changes"],
         "pipelines": ["task", "model", "batch", "mode"]}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_rows_that_cannot_run_are_named_below_the_table(tmp_path, kind):
    if kind == "benchmark":
        write_benchmark(tmp_path / kind, {"teacher": "/t", "slim": "/s"}, {"teacher": 9, "slim": 5})
    else:
        {"cumulative": write_cumulative, "pipelines": write_pipelines}[kind](tmp_path / kind)
    results = json.loads((tmp_path / kind / "results.json").read_text())
    results["rows"] = [row for row in results["rows"] if not row["cannot"]]
    gone = {key: results["rows"][-1][key] for key in NAMES[kind] if key in results["rows"][-1]}
    results["rows"].append({**gone, "cannot": "there is no room"})
    *table, last = console_text(results).splitlines()
    name = ", ".join(str(value) for key, value in gone.items() if key != "changes")
    assert table and last == f"{name}: cannot run: there is no room"
    results["rows"] = results["rows"][-1:]
    assert console_text(results) == last
