"""Finished work ends well on any terminal: ASCII, Latin-1, a reader that leaves, files in another encoding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slimstep.engine.console import print_for_programs

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from slimstep.engine.console import open_console

open_console()
print("Δ −0.5 ± 0.1 → ─ …, ein Käse, 画", flush=True)
print("ε → v", file=sys.stderr)
import logging
logging.basicConfig(format="%(message)s")
logging.warning("σ → 0")
with open(sys.argv[1], "w") as file:
    file.write("画 ±")
for _ in range(int(sys.argv[2])):
    print("x" * 1000)
print(end="", flush=True)
print("worked to its end", file=sys.stderr)
"""
PLAIN = b"Delta  -0.5 +/- 0.1 -> - ..., ein "


def run(folder, lines=0, **variables):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    command = program(folder, lines)
    env |= {"PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def program(folder, lines):
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    return [sys.executable, str(folder / "program.py"), str(folder / "page"), str(lines)]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PYTHONIOENCODING": "ascii"}, PLAIN + rb"K\xe4se, \u753b"),
        ({"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"}, PLAIN + rb"K\xe4se, \u753b"),
        ({"PYTHONIOENCODING": "latin-1"}, b"Delta  -0.5 \xb1 0.1 -> - ..., ein K\xe4se, " + rb"\u753b"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0"}, PLAIN + rb"K\xe4se, \u753b"),
        ({"PYTHONUTF8": "1"}, "Δ −0.5 ± 0.1 → ─ …, ein Käse, 画".encode()),
    ],
    ids=["ASCII", "ASCII at once", "Latin-1", "a locale without UTF-8", "UTF-8"],
)
def test_every_sign_is_said_in_every_encoding_and_files_are_utf_8(tmp_path, variables, expected):
    process = run(tmp_path, **variables)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout.rstrip(b"\n")) == (0, expected), stderr
    assert stderr.endswith(b"worked to its end\n") and b"Traceback" not in stderr and stderr.count(b"\n") == 3
    assert (tmp_path / "page").read_text(encoding="utf-8") == "画 ±"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_work_goes_on_when_its_reader_leaves(tmp_path, unbuffered):
    process = run(tmp_path, lines=1000, PYTHONUTF8="1", PYTHONUNBUFFERED=unbuffered)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read().endswith(b"worked to its end\n")
    assert process.wait() == 0


def test_a_program_without_an_output_runs(tmp_path):
    command = program(tmp_path, 0)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], env=env, capture_output=True)
    assert closed.returncode == 0, closed.stderr


# run_package.py travels with packages, without us, and prints ASCII alone.
PROGRAMS = sorted(path for path in (ROOT / "scripts").glob("*.py") if path.name != "run_package.py")


@pytest.mark.parametrize("script", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_opens_its_console(script):
    text = script.read_text(encoding="utf-8")
    assert ("__main__" in text) == ("    open_console()" in text)


def test_json_is_for_programs_and_not_for_terminals(monkeypatch, capsys):
    print_for_programs({"run": "a"})
    assert capsys.readouterr().out == '{"run": "a"}\n'
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_for_programs({"run": "a"})
    assert capsys.readouterr().out == ""
