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
    found, variables = [], {}
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        block = re.sub(r"\\\n\s*", " ", block)
        for name, value in re.findall(r'^(\w+)="(.*?)"', block, re.MULTILINE | re.DOTALL):
            variables[name] = value
        for line in block.splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            found.append([word.replace("…", "DIR") for word in words if word not in ("…", "[…]")])
    return [words for words in found if words]


def overrides(words: list[str]) -> list[str] | None:
    """What follows train.py, or None for another command."""
    return words[words.index("train.py") + 1 :] if "train.py" in words else None


JOBS = [(page, words) for page in PAGES for words in map(overrides, commands(page)) if words]
COMMANDS = {tuple(words) for page in PAGES for words in commands(page) if words[0] == "slimstep"}
SCRIPTS = sorted({word for page in PAGES for words in commands(page) for word in words if word.startswith("scripts/")})


def test_commands_are_found():
    assert len(JOBS) > 25 and SCRIPTS and len(COMMANDS) > 2


@pytest.mark.parametrize(("page", "words"), JOBS, ids=[" ".join(words)[:60] for _, words in JOBS])
def test_a_job_of_the_pages_has_the_keys_it_is_given(page, words):
    check_overrides(words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_of_the_pages_has_the_options_it_is_given(script):
    given = {word.partition("=")[0] for page in PAGES for words in commands(page) if script in words
             for word in words[words.index(script) :] if word.startswith("--") and word != "--"}  # fmt: skip
    assert (ROOT / script).is_file()
    environment = {**os.environ, "COLUMNS": "200"}
    shown = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0 and all(option in shown.stdout for option in given), (given, shown.stdout)


@pytest.mark.parametrize("words", sorted(COMMANDS), ids=" ".join)
def test_a_command_of_the_pages_has_the_options_it_is_given(words):
    shown = help_of(*words[:2])
    assert f"usage: slimstep {words[1]}" in shown
    assert all(word.partition("=")[0] in shown for word in words if word.startswith("--"))


@cache
def help_of(module: str, command: str) -> str:
    asked = [sys.executable, "-m", module, command, "--help"]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(asked, capture_output=True, text=True, check=True, env=environment, cwd=ROOT).stdout


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
