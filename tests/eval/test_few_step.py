"""The table of size and steps, from distillations with made-up numbers: what it says is recomputed from their files."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from benchmarks import few_step_table
from slimstep.eval.evaluator import compared
from slimstep.eval.metrics.compare import mean_and_error, paired_difference, paired_ratio
from slimstep.eval.pages.few_step import common_guidance, read_runs, rows_of, write_few_step
from slimstep.eval.pages.steps_page import points_table, timed_points
from slimstep.eval.record import Evaluation, Point
from tests.eval.results_stub import ENVIRONMENT, SCORER
from tests.eval.run_stub import PROMPTS, write

N, PROTOCOL = 24, {"scheduler": "DDIMScheduler", "seed": 1}
LOSS = {"teacher": 0.0, "student": 1.0, "steps-4": 0.5, "steps-1": 2.0}


def noisy(mean, seed, n=N, sd=0.3):
    return (mean + np.random.default_rng(seed).normal(0, sd, n)).tolist()


def summary(kind, values, **more):
    mean = mean_and_error(values)
    return {"kind": kind, "mean": mean.mean, "se": mean.se, "per_prompt": values, **more}


def point(model, steps, seed, extra=0.0, guidance=2.5):
    easy = np.random.default_rng(9).normal(80, 4, N)
    loss = LOSS[model] + extra
    metrics = {
        "clip": summary("per_image", (easy - noisy(loss, seed, sd=0.3 if loss else 0)).tolist()),
        "features": None if model == "teacher" else summary("paired", noisy(0.9, seed, sd=0.01)),
        "latent_error": None if model == "teacher" else summary("paired", noisy(0.2, seed, sd=0.01)),
        "diversity": summary("per_prompt", noisy(0.3 / (1 + loss), seed, 6, 0.01), n=6, seeds=8),
        "fd": {"kind": "distribution", "fd": 0.1 + loss / 10, "kd": 0.0, "kd_se": 0.0, "coverage": 0.8 - loss / 10,
               "coverage_expected": 0.8, "density": 1.0, "k": 5, "n": N, "n_real": 64, "features": "made up"},
    }  # fmt: skip
    return Point(model, steps, guidance, metrics, {**PROTOCOL, "steps": steps}, {"evaluations": 2 * steps})


def write_distillation(folder, students, pruned=False, extra=0.0, seed=0, paired=False, **changes):
    """A run whose teacher makes 32 steps; `students` are numbers of steps, `extra` what the pruned network loses.
    Differences are there where it is `paired`: bootstraps take long."""
    points = [point("teacher", 32, 0)] + ([point("student", 32, 50, extra)] if pruned else [])
    points += [point(f"steps-{n}", n, seed + n, extra + pruned) for n in students]
    models = dict.fromkeys(p.model for p in points)
    value = Evaluation(**{
        "models": {name: name for name in models}, "reference": {"model": "teacher", "steps": 32}, "prompts": "shapes",
        "prompts_hash": "0bd7cd5da5da", "n": N, "shown": tuple(PROMPTS), "protocol": {**SCORER, "seed": 1},
        "points": tuple(compared(p, points[0]) if paired else p for p in points), "environment": ENVIRONMENT, **changes,
    })  # fmt: skip
    write(folder / "evaluation.json", value.as_json())
    ms = {"teacher": 3.0, "student": 2.0, **{f"steps-{n}": 2.0 if pruned else 3.0 for n in students}}
    write(folder / "unet_ms.json", {"ms": {"1": {k: v / 2 for k, v in ms.items()}, "2": ms}})
    for p in points:
        for i in range(len(PROMPTS)):
            path = folder / f"images/{p.model}/steps-{p.steps}-guidance-2.5/{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * i, 8 * p.steps % 256, 90)).save(path)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    full = write_distillation(folder / "full", [4, 1], paired=True)
    return [("full", full), ("pruned", write_distillation(folder / "pruned", [4, 1], True, seed=100, paired=True))]


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """The folder of the table, and what a terminal gets."""
    out = tmp_path_factory.mktemp("out")
    return out, write_few_step(runs, out)


def test_the_table_has_every_network_at_the_teachers_steps_and_at_few(written):
    out, text = written
    table = (out / "table.md").read_text()
    first = table.split("\n\n")[0].splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:3]] for line in first[2:]] == [
        ["full", "32"], ["full", "4"], ["full", "1"], ["pruned", "32"], ["pruned", "4"], ["pruned", "1"]
    ]  # fmt: skip
    for heading in ("CLIP ± se", "features", "latent error", "diversity over", "FD ×100", "coverage", "denoiser ms"):
        assert heading in first[0] and heading in text
    page = (out / "report.html").read_text()
    assert "Do the losses of size and of steps add up?" in page and "0.80 of 0.80" in page and "<svg" in page


def test_differences_ratios_and_times_equal_a_recomputation_from_the_runs(runs, written):
    rows = json.loads((written[0] / "table.json").read_text())["rows"]
    for row in rows:
        folder = dict(runs)[row["network"]]
        points = {(p["model"], p["steps"]): p for p in json.loads((folder / "evaluation.json").read_text())["points"]}
        own, teacher = points[row["model"], row["steps"]]["metrics"], points["teacher", 32]["metrics"]
        versus = row["metrics"]["clip"]["versus_reference"]
        if row["model"] == "teacher":
            assert versus is None and row["of_teachers_ms"] == 1
            continue
        assert versus == asdict(paired_difference(own["clip"]["per_prompt"], teacher["clip"]["per_prompt"]))
        both = [m["diversity"]["per_prompt"] for m in (own, teacher)]
        assert row["metrics"]["diversity"]["ratio_to_reference"] == asdict(paired_ratio(*both))
        ms = row["steps"] * (2.0 if row["network"] == "pruned" else 3.0)
        assert row["unet_ms"] == pytest.approx(ms) and row["of_teachers_ms"] == pytest.approx(ms / (32 * 3.0))


def test_what_pruning_costs_is_paired_and_so_is_what_it_costs_beyond_at_few_steps(runs, written):
    rows = rows_of(read_runs(runs), 2.5)
    clip = {(row.label, row.point.steps): np.array(row.point.clip["per_prompt"]) for row in rows}
    effects = json.loads((written[0] / "table.json").read_text())["effects"]
    assert [(effect["network"], effect["steps"]) for effect in effects] == [("pruned", n) for n in (32, 4, 1)]
    for effect in effects:
        cost, most = (clip["pruned", n] - clip["full", n] for n in (effect["steps"], 32))
        assert effect["clip"]["mean"] == pytest.approx(cost.mean())
        if effect["steps"] < 32:
            assert effect["beyond"]["mean"] == pytest.approx((cost - most).mean())
            assert (
                abs(effect["beyond"]["mean"]) < 0.5 < -effect["clip"]["mean"]
            )  # made to cost 1 at any number of steps


def test_a_network_that_went_on_from_few_steps_has_no_row_of_many(runs, tmp_path):
    """Neither the teacher's in its place, nor what the losses of size and of steps add up to."""
    went_on = write_distillation(tmp_path / "on", [4], True, seed=100, paired=True)
    record = json.loads((went_on / "evaluation.json").read_text())
    record["points"] = [point for point in record["points"] if point["model"] != "student"]
    (went_on / "evaluation.json").write_text(json.dumps(record))
    write_few_step([runs[0], ("pruned", went_on)], tmp_path / "out")
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert [row["steps"] for row in table["rows"] if row["network"] == "pruned"] == [4]
    assert [(effect["steps"], effect["beyond"]) for effect in table["effects"]] == [(4, None)]


def test_a_network_may_have_a_run_for_every_number_of_steps(tmp_path):
    split = [("full", write_distillation(tmp_path / f"full-{n}", [n])) for n in (1, 4)]
    assert [(r.point.model, r.point.steps) for r in rows_of(read_runs(split), 2.5)] == [
        ("teacher", 32), ("steps-4", 4), ("steps-1", 1)
    ]  # fmt: skip
    twice = [*split, ("full", write_distillation(tmp_path / "again", [4]))]
    with pytest.raises(ValueError, match=r"full: more than one run has a student of \[4\] steps"):
        rows_of(read_runs(twice), 2.5)
    pruned = [("pruned", write_distillation(tmp_path / f"p{n}", [n], True, extra=n)) for n in (1, 4)]
    with pytest.raises(ValueError, match="p1, .*p4 began with different networks: pruned"):
        rows_of(read_runs([*split, *pruned]), 2.5)


def other_teacher(folder):
    return write_distillation(folder, [4], points=(point("teacher", 32, 0, extra=0.5), point("steps-4", 4, 4)))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda f: write_distillation(f, [4], prompts_hash="other"), "other was scored with other prompts"),
        (lambda f: write_distillation(f, [4], protocol={**SCORER, "seed": 2}), "other was scored with other seed"),
        (lambda f: write_distillation(f, [4], reference={"model": "teacher", "steps": 8}), "'steps': 8"),
        (other_teacher, "other and .*full are not of one teacher: CLIP scores differ by up to"),
        (lambda f: f, "other is no finished distillation"),
    ],
)
def test_runs_that_cannot_be_paired_are_refused_by_name(runs, tmp_path, make, expected):
    with pytest.raises(ValueError, match=expected):
        read_runs([runs[0], ("pruned", make(tmp_path / "other"))])


def test_a_scale_is_asked_for_where_runs_share_several(runs):
    full, pruned = read_runs(runs)
    assert common_guidance([full, pruned]) == 2.5
    with pytest.raises(ValueError, match=r"guidance scale 7.0 for one table; all runs have students at \[2.5\]"):
        common_guidance([full, pruned], 7.0)


def test_the_script_writes_the_table_and_ends_in_a_line_where_it_cannot(runs, tmp_path, monkeypatch, capsys):
    (_, full), _ = runs
    words = ["few_step_table.py", "--full", str(full), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    few_step_table.main()
    assert "full" in capsys.readouterr().out and (tmp_path / "out/table.json").is_file()
    monkeypatch.setattr("sys.argv", [*words, "--pruned", str(tmp_path)])
    with pytest.raises(SystemExit, match="^error: .* is no finished distillation"):
        few_step_table.main()


def test_the_steps_page_shows_diversity_and_coverage(runs):
    table = points_table(timed_points(runs[0][1]))
    assert {"diversity ± se", "diversity over the reference's", "coverage", "FD ×100"} <= set(table.header)
    by_place = {(row[0], row[2]): dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert by_place["teacher", "32"]["coverage"] == "0.80 of 0.80"
    assert by_place["teacher", "32"]["diversity over the reference's"] == "–" != by_place["steps-4", "4"]["coverage"]
