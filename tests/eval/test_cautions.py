"""What a run's numbers leave in doubt stands at the head of its pages, and nothing does where they do not."""

import json
from pathlib import Path

import pytest

from slimstep.eval.pages.cautions import cautions, cautions_of, score_cautions
from slimstep.eval.pages.comparison import compare_runs
from slimstep.eval.pages.run_page import write_report
from tests.eval.run_stub import write_run

SHIPPED = Path(__file__).parents[2] / "benchmarks/prune-baselines/block-scores.json"


def block(lost, se=1.0, **more):
    return {"delta_clip": lost, "se": se, "n": 8, "psnr": 20.0, **more}


def scores(agreement=0.9, losses=(5, 6, 7), **more):
    blocks = {f"block {k}": block(lost, **more) for k, lost in enumerate(losses)}
    return {"rank_agreement_of_halves": agreement, "sites": blocks}


def versus(own, shuffled, se):
    means = {"own": own, "shuffled": shuffled, "difference": own - shuffled}
    share = 0.9 if own > shuffled else 0.5
    return {"images": 64, **{k: {"mean": v, "se": se, "n": 64} for k, v in means.items()}, "prefer_own": share}


def test_clear_block_scores_leave_nothing_in_doubt():
    assert score_cautions(scores()) == []
    assert score_cautions(json.loads(SHIPPED.read_text())) == []


@pytest.mark.parametrize("agreement", [0.49, 0.0, -0.2, float("nan")])
def test_halves_that_do_not_agree_are_reported_with_the_way_out(agreement):
    (sentence,) = score_cautions(scores(agreement))
    assert "below 0.5" in sentence and "more scoring.prompts, another scorer, or a longer training" in sentence


def test_losses_within_their_error_are_reported_where_most_are():
    assert score_cautions(scores(losses=(0.5, -0.5, 7, 8))) == []
    (sentence,) = score_cautions(scores(losses=(0.5, -0.5, 1.0, 8)))
    assert "of 3 of the 4 blocks" in sentence and "scoring.prompts" in sentence


def test_blocks_that_change_no_image_are_within_their_error_rightly():
    assert score_cautions(scores(losses=(0, 0, 0), picture_error=1e-5)) == []
    assert score_cautions(scores(losses=(0, 0, 0), picture_error=0.5)) != []
    assert score_cautions(scores(losses=(0, 0, 0), picture_error=None)) != []


def of_teacher(record):
    return lambda evaluation: evaluation["points"][0]["facts"].update(against_shuffled=record)


@pytest.mark.slow
def test_the_sentences_stand_at_the_head_of_every_page(tmp_path):
    run = write_run(tmp_path / "prune_unet")
    quiet = write_report(run).read_text()
    assert 'class="caution"' not in quiet and cautions(run) == []
    (run / "scorer_check.json").write_text(json.dumps({"scorer": {"model": "shapes-clip"}, **versus(2.0, 1.9, 1.0)}))
    edit(run / "evaluation.json", of_teacher(versus(4.0, 4.5, 1.0)))
    edit(run / "round-00/scores.json", lambda value: value.update(rank_agreement_of_halves=0.2))
    head = write_report(run).read_text().partition("<h1>")[0]
    doubts = "the scorer shapes-clip cannot evaluate these data", "the teacher is at chance", "round-00: two halves"
    for said in doubts:
        assert said in head, said
    compare_runs([run, write_run(tmp_path / "other", seed=1)], tmp_path / "both")
    head = (tmp_path / "both/report.html").read_text().partition("<h1>")[0]
    assert "prune_unet: the scorer shapes-clip cannot evaluate these data" in head


def test_a_teacher_above_chance_is_no_caution(tmp_path):
    run = write_run(tmp_path / "prune_unet")
    edit(run / "evaluation.json", of_teacher(versus(30.0, 10.0, 1.0)))
    assert cautions(run) == []


def test_what_several_runs_say_is_said_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        record = {"scorer": {"model": "x"}, **versus(2.0, 1.9, 1.0)}
        (tmp_path / name / "scorer_check.json").write_text(json.dumps(record))
    (sentence,) = cautions_of({name: tmp_path / name for name in ("a", "b", "c")})
    assert sentence.startswith("a, b: the scorer x cannot evaluate")


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_doubt_names_the_metric_that_blocks_were_ranked_by():
    (sentence,) = score_cautions({**scores(losses=(0.1, 0.1)), "protocol": {"metric": "psnr"}})
    assert sentence.startswith("psnr lost is within its error")
