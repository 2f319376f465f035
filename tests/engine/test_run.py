"""A run directory: what exists is not made again, and half a file is no file."""

import json

import pytest
import torch
from accelerate import Accelerator

from slimstep.engine.files import whole_folder, write_tensors, write_text
from slimstep.engine.run import Run, differences


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run", Accelerator(cpu=True))


def test_what_exists_is_not_made_again(run):
    assert run.json("table.json", lambda: {"ms": 1}) == {"ms": 1}
    assert run.json("table.json", lambda: pytest.fail("made twice")) == {"ms": 1}


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "export") as aside:
        (aside / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_rewinding_forgets_later_steps_of_one_stage_and_a_torn_line(run):
    for stage, step in (("a", 1), ("b", 1), ("b", 2)):
        run.log(stage, step, {"loss": 0.5})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "b", "st')
    run.rewind("b", 1)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("a", 1), ("b", 1)]


def test_a_directory_made_by_another_configuration_is_refused_by_name_and_values(run):
    run.keep_config({"seed": 0, "train": {"steps": 10}, "debug": False}, ignoring=("debug",))
    run.json("table.json", lambda: {"ms": 1})
    run.keep_config({"seed": 0, "train": {"steps": 10}, "debug": True}, ignoring=("debug",))
    with pytest.raises(ValueError, match=r"train.steps: 10 there, 20 now.*name="):
        run.keep_config({"seed": 0, "train": {"steps": 20}, "debug": False}, ignoring=("debug",))
    run.keep_config({"seed": 0, "train": {"steps": 20}, "debug": False}, ignoring=("debug", "train.steps"))


def test_a_directory_in_which_nothing_was_made_takes_another_configuration(run):
    run.keep_config({"model": "/mistyped"}, ignoring=())
    run.keep_config({"model": "/right"}, ignoring=())
    assert "/right" in (run.path / "config.yaml").read_text()


def test_differences_name_leaves_by_their_dotted_keys():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == {"a.c": (2, 3), "d": (None, 4)}


def test_overwriting_moves_aside_what_another_configuration_made(run):
    for seed in (0, 1, 2):
        run.keep_config({"seed": seed}, ignoring=(), overwrite=True)
        run.json("table.json", lambda seed=seed: {"seed": seed})
    made = {path.name: json.loads((path / "table.json").read_text()) for path in run.path.parent.iterdir()}
    assert made == {"run": {"seed": 2}, "run.before-1": {"seed": 0}, "run.before-2": {"seed": 1}}


@pytest.mark.parametrize("damage", ["changed", "gone", "added"])
def test_a_sealed_folder_is_refused_when_it_is_not_what_was_written(run, damage):
    def make(folder):
        folder.mkdir(parents=True)
        (folder / "weights").write_text("right")
        (folder / "config").write_text("right")

    folder = run.sealed_folder("export", make)
    assert run.sealed_folder("export", lambda folder: pytest.fail("made twice")) == folder
    {"changed": lambda: (folder / "weights").write_text("wrong"), "gone": (folder / "weights").unlink,
     "added": lambda: (folder / "more").touch()}[damage]()  # fmt: skip
    with pytest.raises(ValueError, match="more" if damage == "added" else "not what was written: weights"):
        run.sealed_folder("export", make)


def test_a_sealed_folders_model_card_may_change(run):
    folder = run.sealed_folder("export", lambda path: write_text(path / "weights", "1"))
    for text in ("made later", "edited"):
        write_text(folder / "README.md", text)
        assert run.sealed_folder("export", lambda path: pytest.fail("made twice")) == folder


def test_what_cannot_be_written_is_said(tmp_path):
    """safetensors' message begins with an empty line."""
    weight = torch.zeros(2)
    with pytest.raises(OSError, match=r"cannot be written: Some tensors share memory"):
        write_tensors(tmp_path / "tied.safetensors", {"a": weight, "b": weight})
