"""The tested set: constraints.txt has every library that is asked for, and whoever has others is told."""

import tomllib

import pytest
from packaging.requirements import Requirement

import slimstep.engine.tested
from slimstep.engine.tested import CONSTRAINTS, ROOT, outside_the_tested_set, read_constraints

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
def test_the_tested_release_is_one_that_pip_alone_may_install(line):
    requested = Requirement(line)
    specifier = read_constraints()[requested.name].specifier
    exact = [tested.version for tested in specifier if tested.operator == "=="]
    assert all(requested.specifier.contains(version, prereleases=True) for version in exact)
    assert exact or str(requested.specifier) in str(specifier), "a range begins with the oldest release that is allowed"


def test_readme_says_what_was_tested_when():
    assert CONSTRAINTS.read_text().splitlines()[0].removeprefix("# ") in (ROOT / "README.md").read_text().splitlines()


def test_a_library_of_another_release_is_named_with_both(monkeypatch):
    versions = {name: str(next(iter(r.specifier)).version) for name, r in read_constraints().items()}
    versions |= {"torch": "2.12.1+cu130", "torchvision": "0.28.0"}
    monkeypatch.setattr(slimstep.engine.tested, "version", versions.__getitem__)
    assert outside_the_tested_set() == ""
    versions |= {"peft": "99.1", "torch": "1.0"}
    message = outside_the_tested_set()
    assert "peft 99.1, tested ==" in message and "torch 1.0, tested " in message and "diffusers" not in message
