"""The tested set: constraints.txt names the releases that every test passed with."""

import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

import slimstep
from slimstep import ROOT

CONSTRAINTS = Path(slimstep.__file__).with_name("constraints.txt")


def direct_requirements() -> Iterator[Requirement]:
    """What pyproject.toml asks for, the optional parts included; an installed copy keeps it as its metadata."""
    file = ROOT / "pyproject.toml"
    if not file.exists():
        yield from map(Requirement, requires("slimstep") or [])
        return
    project = tomllib.loads(file.read_text())["project"]
    for line in [*project["dependencies"], *(x for group in project["optional-dependencies"].values() for x in group)]:
        yield Requirement(line)


def read_constraints() -> dict[str, Requirement]:
    """{package: the releases of it in the tested set}."""
    lines = (line.partition("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    return {requirement.name: requirement for requirement in map(Requirement, filter(None, lines))}


def outside_the_tested_set() -> str:
    """One line that names the libraries of other releases than those tested; empty where there is none."""
    tested, names = read_constraints(), {requirement.name for requirement in direct_requirements()}
    others = [text for name in sorted(names & tested.keys()) if (text := other_release(tested[name]))]
    return f"not in the tested set (constraints.txt): {', '.join(others)}" if others else ""


def other_release(tested: Requirement) -> str:
    """'NAME 1.2, tested ==1.1' where another release is installed; empty where not, and where none is."""
    try:
        installed = version(tested.name)
    except PackageNotFoundError:
        return ""
    return "" if tested.specifier.contains(installed, True) else f"{tested.name} {installed}, tested {tested.specifier}"
