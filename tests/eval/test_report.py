"""A report is made of a run's files, as far as there are any; a comparison only of finished runs."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from slimstep.commands.report import main
from slimstep.eval.pages.comparison import compare_runs, run_table
from slimstep.eval.pages.run_page import write_report
from slimstep.eval.pages.runs import read_run, run_names
from slimstep.eval.pages.text import count, flatten
from tests.eval.run_stub import PROMPTS, sd15_blocks, write_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "prune_unet")
    write_report(folder)
    return folder


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_the_page_needs_nothing_beside_itself(finished):
    page = (finished / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "url(http" not in page and "@import" not in page and "<script src" not in page
    assert page.count('<img src="data:image/png;base64,') == 2 * len(PROMPTS)


def test_the_page_tells_the_outcome_and_how_it_was_measured(finished):
    page = (finished / "report.html").read_text()
    student = read_run(finished).models[-1]
    for said in (f"{student.clip['mean']:.2f}", "round 1", "26 / 38", "2.09 M", "ba9876543210", "in_place_hooks",
                 "trust_remote_code=True", "its neighbours are not", "shapes-clip", *PROMPTS):  # fmt: skip
        assert said in page, said


def with_motion(folder: Path, over: dict | None) -> Path:
    """The run as one of videos, whose students' motion is so much of the teacher's."""

    def change(content: dict) -> None:
        for point in content["points"]:
            measured = {"kind": "per_image", "mean": 3.0, "se": 0.1, "per_prompt": [3.0] * 64, "versus_reference": None}
            ratio = None if point["model"] == "teacher" else over
            point["metrics"]["motion"] = {**measured, "compared_by_ratio": True, "ratio_to_reference": ratio}

    edit(folder / "evaluation.json", change)
    return folder


def test_a_teacher_whose_videos_stand_still_has_a_page(finished, tmp_path):
    folder = with_motion(shutil.copytree(finished, tmp_path / "still"), None)
    assert "motion" in write_report(folder).read_text()


def test_a_student_that_moves_less_shows_in_table_page_and_terminal(finished, tmp_path):
    over = {"ratio": 0.25, "low": 0.21, "high": 0.29, "n": 64}
    folder = with_motion(shutil.copytree(finished, tmp_path / "videos"), over)
    page = write_report(folder).read_text()
    assert "motion over the reference" in page and page.count("0.25 [0.21, 0.29]") == 3
    assert "21 % to 29 % (95 %)" in page
    assert "motion over teacher's" in run_table(folder) and run_table(folder).count("0.25 [0.21, 0.29]") == 3


def test_rows_of_frames_are_not_squeezed_into_squares(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "videos")
    for picture in (folder / "images").rglob("*.png"):
        Image.new("RGB", (144, 16)).save(picture)
        Image.new("RGB", (16, 16)).save(picture.with_suffix(".webp"))
    assert "side by side" not in write_report(folder).read_text()
    with Image.open(folder / "report/images.png") as drawn:
        assert drawn.width > 2 * drawn.height


def test_the_pictures_lie_beside_the_page(finished):
    names = {path.name for path in (finished / "report").iterdir()}
    assert names == {"blocks.png", "evolution.png", "pareto.png", "additivity.png", "images.png"}


def test_a_report_made_again_is_the_same(finished):
    before = (finished / "report.html").read_text()
    write_report(finished)
    assert (finished / "report.html").read_text() == before


def test_a_run_under_way_has_a_report_that_says_so(tmp_path):
    folder = write_run(tmp_path / "prune_unet", finished=False)
    (folder / "round-01" / "decision.json").unlink()
    (folder / "round-01" / "scores.json").unlink()
    page = write_report(folder).read_text()
    assert "under way: 1 of its rounds" in page and "What each block is worth" in page and "From teacher" not in page
    assert {path.name for path in (folder / "report").iterdir()} == {"blocks.png", "additivity.png"}


def test_a_run_by_hand_is_reported_without_scores(tmp_path):
    folder = write_run(tmp_path / "manual")
    for number in range(2):
        (folder / f"round-{number:02d}" / "scores.json").unlink()

        def forget(decision):
            for action in decision["actions"]:
                action |= {"delta_clip": None, "se": None, "value": None}

        edit(folder / f"round-{number:02d}" / "decision.json", forget)
    page = write_report(folder).read_text()
    assert "not scored" in page and "Block scores" not in page


def test_prompts_are_text_not_markup(tmp_path):
    folder = write_run(tmp_path / "prune_unet")
    edit(folder / "evaluation.json", lambda evaluation: evaluation["shown"].__setitem__(0, "<b>bold</b> & $x_"))
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; $x_" in write_report(folder).read_text()


def test_the_record_knows_when_each_block_went(finished):
    run = read_run(finished)
    assert list(run.latest_blocks) == sd15_blocks()
    assert sorted(run.removed_in.values()) == [0] * 6 + [1] * 6
    for block, number in run.removed_in.items():
        assert block in run.rounds[number].blocks and run.architecture[block].repeats == 0


def test_a_comparison_pairs_students_by_prompt(finished, tmp_path):
    other = write_run(tmp_path / "random", seed=1)
    scores = json.loads((finished / "evaluation.json").read_text())["points"][-1]["metrics"]["clip"]["per_prompt"]

    def slightly_worse(evaluation):
        evaluation["points"][-1]["metrics"]["clip"]["per_prompt"] = [score - 0.5 for score in scores]

    edit(other / "evaluation.json", slightly_worse)
    table = compare_runs([finished, other], tmp_path / "out")
    assert "−0.50 [−0.50, −0.50]" in table.splitlines()[-1]
    assert "−0.50 [−0.50, −0.50]" in (tmp_path / "out" / "table.md").read_text().splitlines()[-1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "table.md",
        "report.html",
        "clip-against-latency.png",
    }


def test_one_teacher_is_listed_once(finished, tmp_path):
    twin = write_run(tmp_path / "twin")
    compare_runs([finished, twin], tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("teacher of") == 1
    assert "+0.00 [+0.00, +0.00]" in table


def test_scores_of_another_metric_are_not_compared(finished, tmp_path):
    other = write_run(tmp_path / "longer", seed=0)
    edit(other / "evaluation.json", lambda evaluation: evaluation["protocol"].update(steps=50))
    table = compare_runs([finished, other], tmp_path / "out")
    assert (tmp_path / "out" / "table.md").read_text().splitlines()[-1].split("|")[-2].strip() == "–"
    assert "nothing to show: against prune_unet" in table
    assert "longer was scored with other steps" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("case", ["missing", "empty", "unfinished", "another job"])
def test_a_run_that_cannot_be_compared_is_one_clear_line(tmp_path, monkeypatch, capfd, case):
    folder = tmp_path / "prune_unet"
    expected = {"missing": "there is no run in", "empty": "holds no evaluation.json", "unfinished": "is not finished",
                "another job": "is no run of prune_unet"}[case]  # fmt: skip
    if case == "empty":
        folder.mkdir()
    elif case == "unfinished":
        write_run(folder, finished=False)
    elif case == "another job":
        write_run(folder)
        edit(folder / "evaluation.json", lambda evaluation: evaluation["facts"].pop("ms"))
    monkeypatch.setattr(sys, "argv", ["slimstep report", str(folder), "--out", str(tmp_path / "out")])
    assert main() == 1
    stdout, stderr = capfd.readouterr()
    assert not stdout and expected in stderr and str(folder) in stderr and len(stderr.splitlines()) == 1


def test_a_run_is_called_by_the_shortest_end_of_its_path_that_is_its_own():
    paths = [Path(path) for path in ("/a/sdxl/evaluate", "/a/sd15/evaluate", "/a/ladder", "/a/ladder")]
    assert run_names(paths) == ["sdxl/evaluate", "sd15/evaluate", "ladder", "ladder"]


def test_parameters_are_counted_in_words():
    assert [count(n) for n in (859_520_964, 2_567_463_684, 64_000, 12, None)] == [
        "859.5 M",
        "2.567 B",
        "64 k",
        "12",
        "–",
    ]


def test_protocols_are_flat_in_the_page():
    assert flatten({"resize": {"size": [64, 64]}, "scale": 100.0}) == {"resize.size": "64, 64", "scale": "100"}


def test_block_values_of_another_metric_are_not_called_clip(tmp_path):
    folder = write_run(tmp_path / "prune_unet", finished=False)
    for path in folder.glob("round-*/scores.json"):
        scores = json.loads(path.read_text())
        path.write_text(json.dumps({**scores, "protocol": {**scores["protocol"], "metric": "psnr"}}))
    page = write_report(folder).read_text()
    assert "<th>psnr lost ± se</th>" in page and "psnr lost per millisecond" in page
    assert "CLIP lost" not in page and "CLIP score lost" not in page
    assert not (folder / "report/evolution.png").exists()  # a base of 50 dB is no CLIP score


def test_a_block_that_a_later_screen_left_out_shows_the_score_it_had(tmp_path):
    folder = write_run(tmp_path / "prune_unet", finished=False)
    first, second = read_run(folder).rounds
    path = next(iter(second.blocks))
    edit(folder / "round-01/scores.json", lambda scores: scores["sites"].pop(path))
    run = read_run(folder)
    assert run.rounds[1].blocks[path].delta_clip is None and run.latest_blocks[path] == first.blocks[path]
    edit(folder / "round-00/scores.json", lambda scores: scores["sites"].pop(path))
    assert read_run(folder).latest_blocks[path] == run.rounds[1].blocks[path]
