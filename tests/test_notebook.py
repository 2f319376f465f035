"""The notebook runs from top to bottom, with smaller trainings; workflows and templates are what GitHub asks for."""

import json
import os
from pathlib import Path

import pytest
import yaml
from PIL import Image

from slimstep import ROOT
from tests.test_snapfusion import SMALL

OPTIONS = 'OPTIONS = ["budget=demo", "data.pairs.size=1024"]'


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, tiny_model, monkeypatch, capsys):
    cells = json.loads((ROOT / "notebooks/demo.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert any(OPTIONS in source for source in sources)
    small = [word for word in [*SMALL, *tiny_model] if not word.startswith("+experiment=")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "PYTHONPATH", str(ROOT))
    namespace: dict = {}
    for source in sources:
        exec(compile(source.replace(OPTIONS, f"OPTIONS = {small!r}"), "demo.ipynb", "exec"), namespace)
    assert "| teacher " in capsys.readouterr().out
    assert [image.size[0] > 0 for image in namespace["images"]] == [True, True]
    assert isinstance(namespace["both"], Image.Image)


@pytest.mark.parametrize("file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda file: file.name)
def test_workflows_and_templates_have_what_github_asks(file: Path):
    value = yaml.safe_load(file.read_text())
    if file.parent.name == "workflows":
        assert {"name", "jobs"} <= value.keys() and True in value  # YAML reads `on` as true
        for job in value["jobs"].values():
            assert job["runs-on"] and job["timeout-minutes"]
            assert all({"uses", "run"} & step.keys() for step in job["steps"])
    elif file.name != "config.yml":
        assert {"name", "description", "body"} <= value.keys()
        ids = [part["id"] for part in value["body"] if part["type"] != "markdown"]
        assert len(ids) == len(set(ids)) and all(part["attributes"]["label"] for part in value["body"] if "id" in part)


def test_the_workflow_runs_the_two_commands():
    text = (ROOT / ".github/workflows/tests.yml").read_text()
    assert "make test" in text and "make demo" in text and "make lint types docs" in text
