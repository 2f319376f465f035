"""A race of changes: what it knows, when it stops, that kills change nothing, and what it says."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.metric import as_metric
from slimstep.eval.pages.cautions import score_cautions
from slimstep.eval.sampling import Sampler
from slimstep.prune.budgets import choices, read_first_round
from slimstep.prune.racing import OPEN, Estimate, Look, look, pooled, run_race, why_stopped
from slimstep.prune.scores import Drawing, score_blocks
from tests.prune.test_job import run
from tests.prune.test_similarity import KINDS, PROMPTS, made


def simulated(seed: int, changes: int = 30):
    """Losses of changes on any number of prompts: log-uniform means, spread and pictures' errors that go with them."""
    draw = np.random.default_rng(seed)
    truth_N = np.exp(draw.uniform(np.log(0.01), np.log(20), changes))
    errors_N = 0.01 * truth_N * np.exp(0.4 * draw.standard_normal(changes))
    return truth_N, errors_N, lambda n, count: truth_N[n] * (1 + 1.5 * draw.standard_normal(count))


def cheapest(count: int):
    return lambda lost: set(np.argsort(lost, kind="stable")[:count].tolist())


# ---- the estimate ----


@pytest.mark.parametrize("count", [2, 4])
def test_pooled_losses_are_nearer_to_the_truth_than_their_means(count):
    """Relative to the truth, in the mean over many worlds: small losses count as large ones do."""
    ours, theirs = [], []
    for seed in range(30):
        truth_N, errors_N, lost = simulated(seed)
        losses = [lost(n, count) for n in range(len(truth_N))]
        estimate = pooled(losses, errors_N, 0.05)
        ours.append(np.mean(np.abs(estimate.mean_N - truth_N) / truth_N))
        theirs.append(np.mean(np.abs(np.array([x.mean() for x in losses]) - truth_N) / truth_N))
    assert np.mean(ours) < 0.85 * np.mean(theirs)


def test_with_many_prompts_the_pooled_loss_is_the_mean_and_its_deviation_the_standard_error():
    truth_N, errors_N, lost = simulated(1)
    losses = [lost(n, 4000) for n in range(len(truth_N))]
    estimate = pooled(losses, errors_N, 0.05)
    np.testing.assert_allclose(estimate.mean_N, [x.mean() for x in losses], rtol=0.05, atol=0.02)
    np.testing.assert_allclose(estimate.sd_N, [x.std(ddof=1) / len(x) ** 0.5 for x in losses], rtol=0.15, atol=0.01)


def test_deviations_say_how_far_estimates_are_off():
    """In many worlds of three prompts the errors are about as large as the deviations say."""
    errors = []
    for seed in range(60):
        truth_N, errors_N, lost = simulated(seed)
        estimate = pooled([lost(n, 3) for n in range(len(truth_N))], errors_N, 0.05)
        errors.append((estimate.mean_N - truth_N) / estimate.sd_N)
    assert 0.7 < np.concatenate(errors).std() < 1.3


@pytest.mark.parametrize("losses", [[np.zeros(2)] * 3, [np.array([0.0, 1.0])] * 2, [np.array([-3.0, -3.0])] * 4])
def test_degenerate_losses_give_finite_estimates(losses):
    for errors_N in (np.zeros(len(losses)), np.linspace(0, 1, len(losses))):
        estimate = pooled(losses, errors_N, 0.05)
        assert np.isfinite(estimate.mean_N).all() and (estimate.sd_N > 0).all()


def test_a_look_knows_what_is_settled():
    estimate = Estimate(np.array([0.0, 1.0, 1.1, 9.0]), np.array([0.1, 0.5, 0.5, 0.1]))
    seen = look(estimate, cheapest(2), 8, 0)
    assert seen.taken_N[0] == pytest.approx(1) and seen.taken_N[3] == 0
    assert seen.open_N.tolist() == [False, True, True, False] and 0 < seen.regret < 0.5
    assert look(estimate, cheapest(1), 8, 0).regret < 0.05 and look(estimate, cheapest(4), 8, 0).regret == 0


# ---- the race ----


@pytest.fixture(scope="module", params=KINDS)
def parts(request, tiny_clip_folder):
    pipeline, unet, _ = made(request.param)
    return unet, Sampler(pipeline, 2, 2.0), as_metric(ClipScorer(f"local-dir:{tiny_clip_folder}"))


def drawing_of(parts):
    unet, sampler, metric = parts
    return Drawing(unet, sampler, metric, PROMPTS, 4, Accelerator(cpu=True))


def raced(parts, tolerance, keep=None, chunk=2, drawing=None):
    drawing = drawing or drawing_of(parts)
    labels, order = parts[0].kept_blocks, range(len(PROMPTS.prompts))
    return run_race(drawing, labels, cheapest(len(labels) // 2), order, chunk, tolerance, 0, keep)


def test_what_is_drawn_is_what_all_prompts_would_draw(parts):
    unet, sampler, metric = parts
    race = raced(parts, 1e-9, chunk=len(PROMPTS.prompts))
    table = score_blocks(unet, sampler, metric, PROMPTS, 4, Accelerator(cpu=True))
    for n, losses in enumerate(race.losses):
        np.testing.assert_allclose(losses, table.loss_NP[n], atol=0.05)
    torch.testing.assert_close(race.base_P, table.base_P)
    assert race.looks[-1].images == len(PROMPTS.prompts) * (1 + len(unet.kept_blocks))


def test_a_race_that_need_not_be_settled_ends_at_its_first_look(parts):
    race = raced(parts, 1e6)
    assert len(race.looks) == 1 and {len(own) for own in race.losses} == {2}
    assert why_stopped(race, 1e6) == "the expected regret is at most 1e+06"


def test_only_what_is_open_is_drawn_again(parts):
    race = raced(parts, 1e-9)
    first = race.looks[0].open_N
    assert all(len(own) == 2 for own, is_open in zip(race.losses, first, strict=True) if not is_open)
    rows = race.rows()
    for label, row in rows.items():
        assert row["n"] == len(row["per_prompt"]) and np.mean(row["per_prompt"]) == pytest.approx(
            row["measured"]["delta_clip"], abs=1e-6
        ), label


def test_a_killed_race_goes_on_to_the_same_end(parts, tmp_path):
    whole = raced(parts, 1e-9, chunk=2)

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
    if len(whole.looks) > 1:
        with pytest.raises(Killed):
            raced(parts, 1e-9, tmp_path, drawing=drawing)
    again = raced(parts, 1e-9, tmp_path)
    assert [of.images for of in again.looks] == [of.images for of in whole.looks]
    assert all(np.array_equal(a, b) for a, b in zip(again.losses, whole.losses, strict=True))
    assert again.rows() == whole.rows()


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
    images = sum(row["n"] for row in rows.values()) + max(row["n"] for row in rows.values())
    assert race["images"] == images == race["looks"][-1]["images"] and race["evaluations"] == images * 4
    decision = json.loads((path / "round-00/decision.json").read_text())
    estimate = {value["site"]: value["delta_clip"] for value in decision["values"] if not value.get("part")}
    assert estimate == {block: row["delta_clip"] for block, row in scores["sites"].items()}
    assert "race" in (path / "report.html").read_text() and not (path / "partial").exists()


def test_other_budgets_of_a_raced_run_add_its_estimates(finished):
    found = choices(read_first_round(finished[0]), [0.9])
    assert all(choice.lost is None or np.isfinite(choice.lost.se) for choice in found)


def test_settings_of_a_race_that_will_not_do_are_named(tmp_path, tiny_model):
    for override, message in (("scoring.race_prompts=1", "race_prompts=1"), ("scoring.tolerance=0", "above 0")):
        refused = run("+experiment=prune_unet", f"root={tmp_path}", override, *tiny_model)
        assert refused.returncode == 1 and message in refused.stderr, refused.stderr


def test_open_shares_are_symmetric():
    seen = Look(1, 0.0, np.array([0.0, OPEN, 0.5, 1 - OPEN, 1.0]))
    assert seen.open_N.tolist() == [False, False, True, False, False]
