"""One page of several runs: what can be compared is, a time belongs to what it timed, a mistake is a line."""

import json
import re
import sys

import pytest

from slimstep import ROOT
from slimstep.commands.report import main
from slimstep.eval.metrics.compare import paired_difference
from slimstep.eval.pages.gathered import Gathered
from slimstep.eval.pages.headline import fastest_not_worse, headline
from slimstep.eval.pages.pareto import Timing, speedup
from slimstep.eval.pages.results import common_settings, pair_matrix, read_results
from slimstep.eval.pages.results_figures import untimed
from slimstep.eval.pages.results_page import compare_results
from tests.eval.results_stub import (
    row,
    scores,
    write_benchmark,
    write_cumulative,
    write_evaluation,
    write_pipelines,
    write_speed,
)
from tests.eval.run_stub import PROMPTS, write_run

MODELS = {"teacher": "/teacher", "pruned": "/pruned", "tiny": "/tiny"}
SHIFTS = {("teacher", 8): 0, ("teacher", 4): 0, ("pruned", 8): 0, ("pruned", 4): 0, ("tiny", 8): -9, ("tiny", 4): -9}
CLIP = {key: scores(shift, seed) for seed, (key, shift) in enumerate(SHIFTS.items())}
TIMES = {"teacher": 100.0, "pruned": 60.0, "tiny": 30.0}


@pytest.fixture
def evaluation(tmp_path):
    return write_evaluation(tmp_path / "evaluate", MODELS, CLIP)


@pytest.fixture
def benchmark(tmp_path):
    return write_benchmark(tmp_path / "benchmark", MODELS, TIMES)


def one(folder, name, where, clip, **changes):
    """An evaluation of one model at 8 steps."""
    return write_evaluation(folder, {name: where}, {(name, 8): clip}, **changes)


# ---- scores ----


def test_one_model_in_two_evaluations_under_two_names_does_not_differ_from_itself(tmp_path):
    folders = [one(tmp_path / name, name, "/model", scores()) for name in ("a", "b")]
    a, b = Gathered(folders).points
    assert (a.label, b.label) == ("a", "b")
    assert b.versus_reference == {"mean": 0.0, "se": 0.0, "low": 0.0, "high": 0.0, "n": 16}


def test_one_model_in_two_evaluations_under_one_name_is_listed_once(tmp_path):
    folders = [one(tmp_path / name, "model", "/model", scores()) for name in ("a", "b")]
    assert len(Gathered(folders).points) == 1


@pytest.mark.parametrize(("where", "clip"), [("/other", scores()), ("/model", scores(seed=5))])
def test_one_name_of_two_models_or_two_outcomes_is_reported_apart(tmp_path, where, clip):
    folders = [one(tmp_path / "a", "model", "/model", scores()), one(tmp_path / "b", "model", where, clip)]
    assert [point.label for point in Gathered(folders).points] == ["model", "model (b)"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"prompts_hash": "another"}, "other prompts"),
    ({"protocol": {"model": "ViT-L-14", "seed": 1}}, "other model"),
    ({"protocol": {"seed": 2}}, "seed"),
])  # fmt: skip
def test_scores_of_another_metric_are_listed_and_not_compared(tmp_path, evaluation, changes, message):
    other = one(tmp_path / "other", "teacher", "/teacher", scores(), **changes)
    compare_results([evaluation, other], tmp_path / "out")
    table = (tmp_path / "out/table.md").read_text()
    (line,) = [line for line in table.splitlines() if "teacher (other)" in line]
    assert line.split("|")[7].strip() == "–" and table.count("teacher (other)") == 1
    assert re.search(
        rf"<b>Not compared:</b> other was scored with .*{message}", (tmp_path / "out/report.html").read_text()
    )


def test_what_leaves_clip_scores_alone_does_not_keep_them_from_being_compared(tmp_path, evaluation):
    protocol = json.loads((evaluation / "evaluation.json").read_text())["protocol"] | {"inception": "6726825d"}
    other = one(tmp_path / "other", "new", "/new", scores(1), protocol=protocol)
    point = Gathered([evaluation, other]).points[-1]
    assert point.versus_reference == vars(paired_difference(scores(1), CLIP["teacher", 8]))
    assert point.metrics["psnr"] is None  # it was measured to the other evaluation's reference


@pytest.mark.parametrize(("weights", "compared"), [("v1", True), ("v2", False)])
def test_preferences_are_compared_of_one_scorer(tmp_path, weights, compared):
    folders = []
    for name, options, shift in (("a", "v1", 0), ("b", weights, 2)):
        folder = one(tmp_path / name, name, f"/{name}", scores(shift))
        results = json.loads((folder / "evaluation.json").read_text())
        results["protocol"]["metrics"] = {"hps": options}
        own = {"kind": "per_image", "mean": shift, "se": 1, "per_prompt": scores(shift), "versus_reference": None}
        results["points"][0]["metrics"]["hps"] = own
        (folder / "evaluation.json").write_text(json.dumps(results))
        folders.append(folder)
    _, point = Gathered(folders).points
    versus = point.metrics["hps"]["versus_reference"]
    assert versus["mean"] == pytest.approx(2) if compared else versus is None
    compare_results(folders, tmp_path / "out")
    assert "hps against the reference" in (tmp_path / "out/table.md").read_text()


def test_the_difference_of_two_models_turns_its_sign_with_them(evaluation):
    points = Gathered([evaluation]).points
    assert common_settings(points) == [(2.5, 8), (2.5, 4)]
    matrix = pair_matrix(points)
    for i, line in enumerate(matrix):
        for j, cell in enumerate(line):
            ours, theirs = (points[k].clip["per_prompt"] for k in (i, j))
            if i != j:
                assert vars(cell) == pytest.approx(vars(paired_difference(ours, theirs)), abs=1e-9)
                assert cell.mean == -matrix[j][i].mean and cell.low == -matrix[j][i].high
            else:
                assert cell is None


# ---- times ----


def test_a_time_belongs_to_the_same_model_steps_and_guidance(tmp_path, evaluation, benchmark):
    found = Gathered([evaluation, benchmark])
    assert {(label, steps): time.ms for (label, _, steps), time in found.timed.items()} == {
        (name, 8): ms for name, ms in TIMES.items()
    }
    assert untimed(found) == ["teacher, pruned, tiny at 4 steps, guidance 2.5"]
    unguided = write_benchmark(tmp_path / "unguided", MODELS, TIMES, protocol={"guidance_scale": 1.0})
    assert not Gathered([evaluation, unguided]).timed


def test_the_time_is_that_of_one_image_of_a_batch(tmp_path, evaluation):
    rows = [row(100, batch=8, steps=8, model="teacher", name="plain")]
    found = Gathered([evaluation, write_speed(tmp_path / "batches", "benchmark", MODELS, rows)])
    assert [time.ms for time in found.timed.values()] == [12.5]


def test_times_of_other_devices_and_setups_are_not_in_one_picture(tmp_path, evaluation, benchmark):
    gpu = {"environment": {"device": "a GPU"}, "protocol": {"clock": "wall"}}
    fast = write_benchmark(tmp_path / "fast", MODELS, {"teacher": 5.0, "pruned": 4.0}, **gpu)
    found = Gathered([evaluation, benchmark, fast])
    assert [condition.device for condition in found.timings] == ["a CPU, 2 cores", "a GPU"]
    assert [condition.device for condition in found.conditions] == ["a CPU, 2 cores"]  # it timed most points


def test_the_fastest_setup_has_a_picture_of_its_own(tmp_path, evaluation):
    setups = {"plain": 1, "slow": 2, "fast": 0.5}
    rows = [row(ms * factor, steps=8, model=name, name=setup) for setup, factor in setups.items()
            for name, ms in TIMES.items()]  # fmt: skip
    rows += [row(10, batch=8, steps=8, model="teacher", name="fast"),
             {"model": "tiny", "name": "x", "steps": 8, "batch": 1, "cannot": "no"}]  # fmt: skip
    found = Gathered([evaluation, write_speed(tmp_path / "setups", "benchmark", MODELS, rows)])
    assert [condition.setup for condition in found.conditions] == ["plain", "fast"]


def test_a_speedup_between_runs_is_marked():
    assert [speedup(Timing(50, run), Timing(100, "a")) for run in "ab"] == ["2.00×", "≈2.00×"]
    assert speedup(Timing(50, "a"), None) == "–"


def test_the_headline_is_the_fastest_model_without_a_visible_loss(evaluation, benchmark):
    found = Gathered([evaluation, benchmark])
    best = fastest_not_worse(found)
    assert (best.label, best.steps) == ("pruned", 8)  # tiny is faster and worse
    assert "pruned at 8 steps draws an image 1.67× as fast as teacher" in headline(found)
    assert "no loss of CLIP score can be shown" in headline(found)
    assert "no model was timed" in headline(Gathered([evaluation]))


def test_where_every_faster_model_is_worse_the_headline_says_so(tmp_path, evaluation):
    found = Gathered([evaluation, write_benchmark(tmp_path / "b", MODELS, {"teacher": 100, "pruned": 101, "tiny": 30})])
    assert fastest_not_worse(found) is None
    assert "tiny at 8 steps" in headline(found) and "like every faster one, it loses CLIP score" in headline(found)


# ---- the page ----


def test_the_page_holds_all_and_needs_nothing_beside_itself(tmp_path, evaluation, benchmark, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    runs = [evaluation, benchmark, write_cumulative(tmp_path / "cumulative"), write_pipelines(tmp_path / "pipelines")]
    table = compare_results(runs, tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "url(http" not in page and "@import" not in page and "<script src" not in page
    assert page.count('<img src="data:image/png;base64,') == len(MODELS) * len(PROMPTS)
    for said in ("pruned, tiny against teacher", "Not timed, and so not shown", "Every two models at 4 steps", "2.50×",
                 "CPU time of one thread", "DDIMScheduler", "f374cc813b38", *PROMPTS):  # fmt: skip
        assert said in page, said
    written = (tmp_path / "out/table.md").read_text()
    assert "## All models" in written and "## All models" in table and max(map(len, table.splitlines())) <= 100
    assert {path.name for path in (tmp_path / "out/figures").iterdir()} == {
        "clip-against-time.png", "clip-against-steps.png", "images.png", "cumulative-cumulative.png",
        "benchmark-parts.png", "pipelines-batch-1.png",
    }  # fmt: skip
    compare_results(runs, tmp_path / "out")
    assert (tmp_path / "out/report.html").read_text() == page


@pytest.mark.parametrize("alone", [write_cumulative, write_pipelines])
def test_what_was_only_timed_is_a_page_too(tmp_path, alone):
    compare_results([alone(tmp_path / "run")], tmp_path / "out")
    assert "All models" not in (tmp_path / "out/report.html").read_text()


def test_a_cumulative_benchmark_of_an_earlier_version_is_read():
    """benchmarks/cumulative was measured when its kind was called ladder."""
    folder = ROOT / "benchmarks/cumulative"
    assert json.loads((folder / "results.json").read_text())["kind"] == "ladder"
    assert read_results(folder).kind == read_results(folder).results["kind"] == "cumulative"


def test_a_benchmark_alone_says_its_fastest_config(tmp_path, benchmark):
    compare_results([benchmark], tmp_path / "out")
    assert "benchmark, × base" in (tmp_path / "out/report.html").read_text()


def test_what_differs_between_runs_is_named(tmp_path, evaluation):
    other = one(tmp_path / "other", "new", "/new", scores(), environment={"device": "a GPU", "threads": 1})
    compare_results([evaluation, other], tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "Environment (other), where it differs" in page and "a GPU" in page


@pytest.mark.parametrize("case", ["missing", "unfinished", "damaged", "cut", "another job", "mixed"])
def test_a_run_that_cannot_be_shown_is_one_clear_line(tmp_path, monkeypatch, capsys, evaluation, case):
    folder, expected = tmp_path / "run", {
        "missing": "there is no run in", "unfinished": "not finished; its command again continues it",
        "damaged": "evaluation.json is damaged", "cut": "it lacks environment", "another job": "it holds no evaluation",
        "mixed": "is a pruning run",
    }[case]  # fmt: skip
    if case != "missing":
        folder.mkdir()
    if case == "mixed":
        write_run(folder)
    text = {"damaged": '{"models": {', "cut": (evaluation / "evaluation.json").read_text().replace("environment", "x"),
            "another job": '{"models": 1, "protocol": 1, "environment": 1}'}  # fmt: skip
    if case in text:
        (folder / "evaluation.json").write_text(text[case])
    monkeypatch.setattr(sys, "argv", ["report.py", str(evaluation), str(folder), "--out", str(tmp_path / "out")])
    assert main() == 1
    out, err = capsys.readouterr()
    assert not out and expected in err and str(folder) in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
