"""An installed copy, away from the checkout, has everything under one import root and runs a job."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import slimstep

ROOT = Path(__file__).resolve().parents[1]
EVALUATION = ["+experiment=evaluate", "eval.prompts=2", "eval.steps=1", "eval.pictures=1", "data.pairs.size=4"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves folders beside what it builds
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    changed = subprocess.run(["git", "diff", "HEAD", "--binary"], cwd=ROOT, capture_output=True, check=True).stdout
    if changed:
        subprocess.run(["git", "apply"], cwd=source, input=changed, check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(build, check=True)
    return next(folder.glob("*.whl"))


def test_a_wheel_holds_one_package_with_its_configs_and_assets(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"slimstep", f"slimstep-{slimstep.__version__}.dist-info"}
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = ("assets", "configs", "data", "distill", "engine", "eval", "models", "prune")
    ours = {file for file in tracked.split("\0") if file.startswith(tuple(f"{folder}/" for folder in folders))}
    pages = {file for file in ours if file.endswith(".md")}
    assert {f"slimstep/{file}" for file in ours - pages} <= set(names), "a folder is in no package of pyproject.toml"


@pytest.mark.slow
def test_an_installed_copy_runs_a_job_away_from_the_checkout(wheel, tmp_path):
    environment, work = tmp_path / "environment", tmp_path / "work"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin/python"
    subprocess.run([sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", wheel], check=True)
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])  # but no .pth of theirs, so no checkout
    without = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*overrides):
        done = subprocess.run([environment / "bin/slimstep", *overrides], cwd=work, env=without, capture_output=True,
                              text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run([python, "-c", "import slimstep.eval as e; print(e.__file__)"], cwd=work, env=without,
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert Path(where.strip()).is_relative_to(site)
    assert run("--version").split() == ["slimstep", slimstep.__version__]
    assert "prune_unet" in run()
    run(*EVALUATION, "name=first")
    assert (work / "runs/first/report.html").exists()
    assert "shapes" in run("compare", "runs/first") and sorted(p.name for p in work.iterdir()) == ["runs"]
    assert not [p.name for p in site.iterdir() if p.name in ("data", "models", "engine", "eval", "configs")]
