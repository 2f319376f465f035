"""Writes the tested set: the releases in this environment, to constraints.txt, and README's line about them.

    make tested       # a new environment of today's releases, every test in it, and then this script

torch and torchvision stay a range: `make tested` runs the fast tests with its oldest torch as well, after this.
"""

import argparse
import datetime
import platform
import re
import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from slimstep.engine.console import open_console
from slimstep.engine.tested import CONSTRAINTS, ROOT, direct_requirements

OF_TORCH = re.compile(r"torch|torchvision|triton|nvidia-.*|cuda-.*")  # torch itself says which of these it wants
RANGES = ("torch", "torchvision")
NOT_OURS = ("slimstep", "pip", "wheel")
LINE = re.compile(r"^The tested set .*$", re.MULTILINE)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    line = sentence(datetime.date.today().isoformat(), commit)
    CONSTRAINTS.write_text(f"# {line}\n" + "".join(f"{line}\n" for line in constraints()))
    readme = ROOT / "README.md"
    text, lines = LINE.subn(line, readme.read_text())
    assert lines == 1, f"README.md has {lines} lines that begin with 'The tested set', not one"
    readme.write_text(text)
    print(line)


def sentence(date: str, commit: str) -> str:
    """What was tested when, in a line."""
    oldest = next(r for r in direct_requirements() if r.name == "torch").specifier
    ends = " and ".join(sorted({min(s.version for s in oldest if s.operator == ">="), version("torch").split("+")[0]}))
    return f"The tested set is of {date}: Python {platform.python_version()}, torch {ends}, commit {commit}."


def constraints() -> list[str]:
    """A line for every installed package: its exact release, and ranges for torch and torchvision."""
    installed = {canonicalize_name(d.metadata["Name"]): Version(d.version).public for d in distributions()}
    lines = [range_of(requirement, installed) for requirement in direct_requirements() if requirement.name in RANGES]
    exact = {name: number for name, number in installed.items() if not OF_TORCH.fullmatch(name)}
    return lines + [f"{name}=={number}" for name, number in sorted(exact.items()) if name not in NOT_OURS]


def range_of(requirement: Requirement, installed: dict[str, str]) -> str:
    """From the oldest release that pyproject.toml allows to the one installed."""
    return f"{requirement.name}{requirement.specifier},<={installed[requirement.name]}"


if __name__ == "__main__":
    open_console()
    main()
