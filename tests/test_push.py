"""slimstep push: a folder for the hub whose card says what its run says, and one line for what it cannot do."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, metadata_load
from PIL import Image

from slimstep.commands.push import main
from slimstep.engine.files import write_json
from slimstep.eval.record import read_evaluation
from slimstep.models.card import Origin
from slimstep.models.pipeline import export_pipeline, load_pipeline

RUN = Path(__file__).parent / "fixtures/former/distill_steps"


@pytest.fixture
def export(tmp_path, tiny_pipeline_folder):
    """An export in a run that has evaluated it."""
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    evaluation = replace(read_evaluation(run), shown=("a red circle",))  # which that version did not keep
    write_json(run / "evaluation.json", evaluation.as_json())
    student = next(p for p in evaluation.points if p.model.startswith("steps-"))
    folder = run / student.model / "export"
    export_pipeline(load_pipeline(tiny_pipeline_folder), folder, origin=Origin("owner/teacher", student.steps, 2.5))
    return folder


def push(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["push.py", *map(str, arguments)])
    code = main()
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_a_ready_folder_is_the_export_with_a_card_of_its_run(
    export, tiny_pipeline_folder, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "ready"
    code, _ = push(monkeypatch, capsys, export, "--repo", "me/small", "--license", "mit", "--folder", folder)
    assert code == 0
    assert len(DiffusionPipeline.from_pretrained(folder)("a", num_inference_steps=1).images) == 1
    data, text = metadata_load(folder / "README.md"), (folder / "README.md").read_text()
    assert (data["license"], data["base_model"], data["library_name"]) == ("mit", "owner/teacher", "diffusers")
    points = read_evaluation(export.parents[1]).points
    student = next(point for point in points if point.model == export.parent.name)
    (result,) = ModelCard.load(folder / "README.md").data.eval_results
    assert result.metric_value == round(student.clip["mean"], 2)
    for said in ('from_pretrained("me/small")', "| this model |", "## Training", "learning rate", "mit, as"):
        assert said in text, said
    assert "THIS_FOLDER" not in text
    texts = [file for file in folder.rglob("*") if file.suffix in (".json", ".md", ".py", ".txt")]
    paths = str(tmp_path), str(tiny_pipeline_folder)
    assert len(texts) > 5 and not [file for file in texts if any(path in file.read_text() for path in paths)]
    report = json.loads((folder / "export_report.json").read_text())
    assert report["load"].startswith('DiffusionPipeline.from_pretrained("me/small"')
    assert Image.open(folder / "samples.png").size[1] > Image.open(next(export.parents[1].rglob("000.png"))).size[1]


def test_the_folder_is_uploaded_as_it_would_be_written(export, tmp_path, monkeypatch, capsys):
    calls = []

    class Hub:
        def create_repo(self, repo, private, exist_ok):
            calls.append((repo, private))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    code, printed = push(monkeypatch, capsys, export, "--repo", "me/small", "--folder", tmp_path / "ready")
    assert code == 0 and not calls
    code, printed = push(monkeypatch, capsys, export, "--repo", "me/small")
    assert code == 0 and printed.strip() == "https://hub/commit"
    written = sorted(path.name for path in (tmp_path / "ready").iterdir())
    assert calls == [("me/small", True), ("me/small", written)] and {"README.md", "samples.png"} <= set(written)


def test_what_is_no_export_or_no_safetensors_is_refused(export, tiny_pipeline_folder, tmp_path, monkeypatch, capsys):
    to = ["--repo", "me/small", "--folder", tmp_path / "ready"]
    code, printed = push(monkeypatch, capsys, tiny_pipeline_folder, *to)
    assert code == 1 and "is no export of slimstep's" in printed
    alone = shutil.copytree(export, tmp_path / "alone")
    code, printed = push(monkeypatch, capsys, alone, *to)
    assert code == 1 and "lies in no run" in printed
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    code, printed = push(monkeypatch, capsys, export, "--repo", "me/small", "--folder", tmp_path / "mine")
    assert code == 1 and "holds something already" in printed and (tmp_path / "mine/notes.txt").is_file()
    (export / "unet/weights.bin").write_bytes(b"")
    code, printed = push(monkeypatch, capsys, export, *to)
    assert code == 1 and "unet/weights.bin; hubs are given safetensors alone" in printed
    assert not (tmp_path / "ready").exists()
    with pytest.raises(SystemExit):
        push(monkeypatch, capsys, export, "--repo", "small")
