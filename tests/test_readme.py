"""Every command of the README and the docs is one that the programs take, and every link leads somewhere."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from slimstep.engine.launch import check_overrides

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def commands(page: str) -> list[list[str]]:
    """The words of every command in the page's shell blocks, its own variables filled in and gaps left out."""
    matched, variables = [], {}
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        block = re.sub(r"\\\n\s*", " ", block)
        for name, value in re.findall(r'^(\w+)="(.*?)"', block, re.MULTILINE | re.DOTALL):
            variables[name] = value
        for line in block.splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            arguments = shlex.split(line, comments=True)
            matched.append([word.replace("…", "DIR") for word in arguments if word not in ("…", "[…]")])
    return [arguments for arguments in matched if arguments]


def overrides(arguments: list[str]) -> list[str] | None:
    """What follows train.py, or None for another command."""
    return arguments[arguments.index("train.py") + 1 :] if "train.py" in arguments else None


JOBS = [(page, arguments) for page in PAGES for arguments in map(overrides, commands(page)) if arguments]
COMMANDS = {tuple(arguments) for page in PAGES for arguments in commands(page) if arguments[0] == "slimstep"}
SCRIPTS = sorted({word for page in PAGES for line in commands(page) for word in line if word.startswith("scripts/")})


def test_commands_are_found():
    assert len(JOBS) > 25 and SCRIPTS and len(COMMANDS) > 2


@pytest.mark.parametrize(("page", "arguments"), JOBS, ids=[" ".join(arguments)[:60] for _, arguments in JOBS])
def test_a_job_of_the_pages_has_the_keys_it_is_given(page, arguments):
    check_overrides(arguments)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_of_the_pages_has_the_options_it_is_given(script):
    options = {word.partition("=")[0] for page in PAGES for arguments in commands(page) if script in arguments
             for word in arguments[arguments.index(script) :] if word.startswith("--") and word != "--"}  # fmt: skip
    assert (ROOT / script).is_file()
    environment = {**os.environ, "COLUMNS": "200"}
    shown = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0 and all(option in shown.stdout for option in options), (options, shown.stdout)


@pytest.mark.parametrize("arguments", sorted(COMMANDS), ids=" ".join)
def test_a_command_of_the_pages_has_the_options_it_is_given(arguments):
    shown = help_of(*arguments[:2])
    assert f"usage: slimstep {arguments[1]}" in shown
    assert all(word.partition("=")[0] in shown for word in arguments if word.startswith("--"))


@cache
def help_of(module: str, command: str) -> str:
    requested = [sys.executable, "-m", module, command, "--help"]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(requested, capture_output=True, text=True, check=True, env=environment, cwd=ROOT).stdout


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/README.md"])
def test_links_lead_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
