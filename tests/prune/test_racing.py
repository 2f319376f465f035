"""A race of changes: what it knows, when it stops, that kills change nothing, and what it says."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.metric import as_metric
from slimstep.eval.pages.cautions import score_cautions
from slimstep.eval.sampling import Sampler
from slimstep.prune.budgets import choices, read_first_round
from slimstep.prune.racing import (
    OPEN,
    PICTURED,
    PROPORTIONAL,
    SCREENED,
    Estimate,
    Look,
    estimated,
    first_drawn,
    look,
    run_race,
    why_stopped,
)
from slimstep.prune.scores import Drawing, score_blocks
from tests.prune.test_job import run
from tests.prune.test_similarity import KINDS, PROMPTS, made


def simulated(seed: int, changes: int = 30, prompts: int = 0, least: int = 0):
    """What changes truly lose; the screen's errors; and their losses and pictures' errors on `least` to `prompts`
    prompts, as the estimate takes the world to be."""
    draw = np.random.default_rng(seed)
    screened_N = np.exp(draw.uniform(np.log(1e-3), np.log(3), changes))
    errors_N = 0.3 * screened_N * np.exp(SCREENED * draw.standard_normal(changes))
    truth_N = 20 * errors_N * np.exp(PROPORTIONAL * draw.standard_normal(changes) - PROPORTIONAL**2 / 2)
    counts = draw.integers(least, prompts + 1, changes)
    losses = [truth_N[n] + 8 * errors_N[n] ** 0.5 * draw.standard_normal(counts[n]) for n in range(changes)]
    errors = [errors_N[n] * np.exp(PICTURED * draw.standard_normal(counts[n])) for n in range(changes)]
    return truth_N, screened_N, losses, errors


def cheapest(count: int):
    return lambda lost: set(np.argsort(lost, kind="stable")[:count].tolist())


def log_deviation(estimate: Estimate) -> np.ndarray:
    return np.sqrt(np.log1p((estimate.sd_N / estimate.mean_N) ** 2))


# ---- the estimate ----


@pytest.mark.parametrize("count", [1, 4])
def test_estimates_are_nearer_to_the_truth_than_means(count):
    """Relative to the truth, in the mean over many worlds: small losses count as large ones do."""
    ours, theirs = [], []
    for seed in range(30):
        truth_N, screened_N, losses, errors = simulated(seed, prompts=count, least=count)
        estimate = estimated(losses, errors, screened_N)
        ours.append(np.mean(np.abs(estimate.mean_N - truth_N) / truth_N))
        theirs.append(np.mean(np.abs([x.mean() for x in losses] - truth_N) / truth_N))
    assert np.mean(ours) < 0.5 * np.mean(theirs)


def test_with_many_prompts_the_estimate_is_the_mean_and_its_deviation_the_standard_error():
    _, screened_N, losses, errors = simulated(1, prompts=20_000, least=20_000)
    estimate, mean_N = estimated(losses, errors, screened_N), np.array([x.mean() for x in losses])
    large_N = mean_N > 0.2 * 20 * estimate.error_N  # below it a loss is held to a share of its proportion
    np.testing.assert_allclose(estimate.mean_N[large_N], mean_N[large_N], rtol=0.05, atol=3e-3)
    errors_N = np.array([x.std(ddof=1) / len(x) ** 0.5 for x in losses])
    np.testing.assert_allclose(estimate.sd_N[large_N], errors_N[large_N], rtol=0.25, atol=3e-3)


@pytest.mark.parametrize("most", [2, 8])
def test_deviations_say_how_far_estimates_are_off(most):
    """In many worlds, where a change has 0 to `most` prompts, logarithms are about as far off as deviations say."""
    off = []
    for seed in range(80):
        truth_N, screened_N, losses, errors = simulated(seed, prompts=most)
        estimate = estimated(losses, errors, screened_N)
        off.append((np.log(estimate.mean_N) - np.log(truth_N)) / log_deviation(estimate))
    assert 0.7 < np.concatenate(off).std() < 1.3


def test_changes_that_were_never_drawn_are_known_from_the_screen_and_from_those_that_were():
    truth_N, screened_N, losses, errors = simulated(3, changes=60, prompts=40, least=40)
    losses, errors = [*losses[:40], *[[]] * 20], [*errors[:40], *[[]] * 20]
    estimate = estimated(losses, errors, screened_N)
    assert (log_deviation(estimate)[40:] > np.quantile(log_deviation(estimate)[:40], 0.9)).all()
    assert np.corrcoef(np.log(estimate.mean_N[40:]), np.log(truth_N[40:]))[0, 1] > 0.8


def test_before_anything_is_drawn_the_estimate_is_in_the_order_of_the_screen():
    _, screened_N, losses, errors = simulated(4)
    estimate = estimated(losses, errors, screened_N)
    assert np.argsort(estimate.mean_N).tolist() == np.argsort(screened_N).tolist()
    np.testing.assert_allclose(log_deviation(estimate), SCREENED)


@pytest.mark.parametrize("losses", [[[0.0, 0.0]] * 3, [[0.0, 1.0], []], [[-3.0, -3.0]] * 4, [[], [5.0]]])
@pytest.mark.parametrize("error", [0.0, 1.0])
def test_degenerate_losses_give_finite_estimates_above_zero(losses, error):
    errors = [[error] * len(own) for own in losses]
    for screened_N in (np.zeros(len(losses)), np.linspace(0, 1, len(losses))):
        estimate = estimated(losses, errors, screened_N)
        assert np.isfinite(estimate.mean_N).all() and (estimate.mean_N > 0).all() and (estimate.sd_N >= 0).all()
        assert np.isfinite(estimate.draw(np.random.default_rng(0))).all()


def test_draws_have_the_mean_and_the_deviation_of_the_estimate():
    estimate = Estimate(np.array([0.1, 5.0]), np.array([0.1, 2.0]), np.ones(2))
    generator = np.random.default_rng(0)
    draws_SN = np.stack([estimate.draw(generator) for _ in range(40_000)])
    np.testing.assert_allclose(draws_SN.mean(0), estimate.mean_N, rtol=0.03)
    np.testing.assert_allclose(draws_SN.std(0), estimate.sd_N, rtol=0.1)
    assert draws_SN.min() > 0


def test_a_look_knows_what_is_settled():
    estimate = Estimate(np.array([0.1, 1.0, 1.1, 9.0]), np.array([0.01, 0.5, 0.5, 0.1]), np.ones(4))
    seen = look(estimate, cheapest(2), 8, 0)
    assert seen.taken_N[0] == pytest.approx(1) and seen.taken_N[3] == 0
    assert seen.open_N.tolist() == [False, True, True, False] and 0 < seen.regret < 0.5
    assert look(estimate, cheapest(1), 8, 0).regret < 0.05 and look(estimate, cheapest(4), 8, 0).regret == 0


@pytest.mark.parametrize("taken, drawn", [([1.0, 1.0, 0.5, 0.4, 0.3, 0.0, 0.0, 0.0], [2, 3, 4]),
                                          ([1.0] * 4 + [0.0] * 4, [0, 1]), ([1.0, 0.98, 0.0, 0.01], [1])])  # fmt: skip
def test_the_first_look_draws_what_is_open_and_a_quarter_of_all_at_least(taken, drawn):
    assert np.flatnonzero(first_drawn(np.array(taken))).tolist() == drawn


# ---- the race ----


@pytest.fixture(scope="module", params=KINDS)
def parts(request, tiny_clip_folder):
    pipeline, unet, _ = made(request.param)
    return unet, Sampler(pipeline, 2, 2.0), as_metric(ClipScorer(f"local-dir:{tiny_clip_folder}"))


def drawing_of(parts):
    unet, sampler, metric = parts
    return Drawing(unet, sampler, metric, PROMPTS, 4, Accelerator(cpu=True))


def raced(parts, tolerance, keep=None, drawing=None):
    labels = parts[0].kept_blocks
    screened = np.geomspace(0.1, 1, len(labels)).tolist()
    return run_race(drawing or drawing_of(parts), labels, screened, cheapest(len(labels) // 2), tolerance, 0, keep)


def test_what_is_drawn_is_what_all_prompts_would_draw(parts):
    unet, sampler, metric = parts
    race = raced(parts, 1e-9)
    table = score_blocks(unet, sampler, metric, PROMPTS, 4, Accelerator(cpu=True))
    for n, (losses, decibels) in enumerate(zip(race.losses, race.psnr, strict=True)):
        np.testing.assert_allclose(losses, table.loss_NP[n][: len(losses)], atol=0.05)
        np.testing.assert_allclose(decibels, table.psnr_NP[n][: len(losses)], atol=0.5)
    torch.testing.assert_close(race.base_P, table.base_P)
    assert max(map(len, race.losses)) > 1 and race.looks[-1].images == sum(map(len, race.losses))


def test_a_race_that_need_not_be_settled_ends_at_its_first_look(parts):
    race = raced(parts, 1e9)
    assert len(race.looks) == 1 and {len(own) for own in race.losses} <= {0, 1}
    assert why_stopped(race, 1e9) == "the expected regret is at most 1e+09"


def test_only_what_is_open_is_drawn_again(parts):
    drawing, asked = drawing_of(parts), []
    changes = drawing.changes
    drawing.changes = lambda pairs, keep=None: asked.append([label for label, _ in pairs]) or changes(pairs, keep)
    race = raced(parts, 1e-9, drawing=drawing)
    for seen, labels in zip(race.looks, asked[1:], strict=False):
        assert {*labels} <= {label for label, is_open in zip(race.labels, seen.open_N, strict=True) if is_open}
    assert any(len(labels) < len(race.labels) for labels in asked[1:])
    assert len(race.looks) == len(asked) > 1


def test_losses_that_cancel_out_do_not_settle_a_race():
    """A sum of losses that is 0 by chance is no reason to think that nothing is lost."""
    losses, screened_N = [[3.0], [-3.0], [2.0], [-2.5]], np.array([0.1, 0.12, 0.14, 0.16])
    estimate = estimated(losses, [[0.1]] * 4, screened_N)
    assert look(estimate, cheapest(2), 4, 0).regret > 0.1


def test_rows_say_what_was_measured_beside_what_is_estimated(parts):
    race = raced(parts, 1e-9)
    rows = race.rows()
    assert list(rows) == list(race.labels) and all(np.isfinite(row["delta_clip"]) for row in rows.values())
    for row in rows.values():
        assert row["n"] == len(row["per_prompt"]) and ("measured" in row) == (row["n"] > 0)
        if row["n"]:
            assert np.mean(row["per_prompt"]) == pytest.approx(row["measured"]["delta_clip"], abs=1e-6)


def test_a_killed_race_goes_on_to_the_same_end(parts, tmp_path):
    whole = raced(parts, 1e-9)

    class Killed(Exception):
        pass

    drawing, calls = drawing_of(parts), []
    changes = drawing.changes

    def some(pairs, keep=None):
        calls.append(len(pairs))
        if len(calls) > 1:
            raise Killed
        return changes(pairs, keep)

    drawing.changes = some
    assert len(whole.looks) > 1
    with pytest.raises(Killed):
        raced(parts, 1e-9, tmp_path, drawing)
    again = raced(parts, 1e-9, tmp_path)
    assert [of.images for of in again.looks] == [of.images for of in whole.looks]
    assert again.losses == whole.losses and again.rows() == whole.rows()


def test_cautions_of_a_race_are_its_own():
    record = {"race": {"tolerance": 0.1, "looks": [{"regret": 0.5}, {"regret": 0.3}]}}
    assert "ended with an expected regret of 0.30, above 0.1" in score_cautions(record)[0]
    record["race"]["looks"].append({"regret": 0.05})
    assert score_cautions(record) == []


# ---- the job ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("raced")
    done = run("+experiment=prune_unet", f"root={root}", "scoring.protocol=racing", "search.rounds=1",
               "search.target_fraction=0.7", "search.actions=[remove,narrow]", *tiny_model)  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    return root / "prune_unet", done.stderr


def test_the_job_says_what_the_race_spent_and_why_it_stopped(finished):
    path, said = finished
    scores = json.loads((path / "round-00/scores.json").read_text())
    race, rows = scores["race"], {**scores["sites"], **scores["narrower"]}
    assert race["stopped"] in said and scores["protocol"]["name"] == "racing"
    images, prompts = sum(row["n"] for row in rows.values()), 4
    assert 0 < race["images"] == images == race["looks"][-1]["images"]
    assert race["evaluations"] == prompts * (4 + 1 + len(rows)) + images * 4
    decision = json.loads((path / "round-00/decision.json").read_text())
    estimate = {value["site"]: value["delta_clip"] for value in decision["values"] if not value.get("part")}
    assert estimate == {block: row["delta_clip"] for block, row in scores["sites"].items()}
    assert "race" in (path / "report.html").read_text() and not (path / "partial").exists()


def test_other_budgets_of_a_raced_run_add_its_estimates(finished):
    found = [choice for choice in choices(read_first_round(finished[0]), [0.9, 0.7]) if choice.actions]
    assert found
    for choice in found:
        assert choice.lost.mean == pytest.approx(sum(action.delta_clip for action in choice.actions))
        assert choice.lost.se == pytest.approx(math.hypot(*(action.se for action in choice.actions)))


def test_settings_of_a_race_that_will_not_do_are_named(tmp_path, tiny_model):
    for override, message in (("scoring.race_prompts=1", "race_prompts=1"), ("scoring.tolerance=0", "above 0")):
        refused = run("+experiment=prune_unet", f"root={tmp_path}", override, *tiny_model)
        assert refused.returncode == 1 and message in refused.stderr, refused.stderr


def test_open_shares_are_symmetric():
    seen = Look(1, 0.0, np.array([0.0, OPEN, 0.5, 1 - OPEN, 1.0]))
    assert seen.open_N.tolist() == [False, False, True, False, False]
