"""The screen before the scores: its errors are those of surgery, and the blocks that it leaves are enough."""

import json

import pytest
import torch
from accelerate import Accelerator

from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.metric import as_metric
from slimstep.eval.sampling import Sampler
from slimstep.prune.evolve import BlockValue, choose_removals
from slimstep.prune.scores import score_blocks
from slimstep.prune.screening import Screen, screen_blocks
from tests.jobs import run_job
from tests.prune.test_job import SMALL
from tests.prune.test_similarity import KINDS, PROMPTS, made


def screened(kind, batch_size=2, guidance=2.5, steps=2):
    pipeline, unet, _ = made(kind)
    sampler = Sampler(pipeline, steps, guidance)
    return sampler, unet, screen_blocks(unet, sampler, PROMPTS, batch_size, Accelerator(cpu=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_an_error_is_that_of_the_network_without_the_block(kind, guidance):
    """By hand: surgery, at the step of the whole network's sampling that is the prompt's turn, without guidance."""
    sampler, unet, screen = screened(kind, guidance=guidance)
    block, errors = KINDS[kind][2], []
    pruned = unet.with_architecture({block: 0})
    for index in range(3):
        inputs, cond = [], sampler.encode(PROMPTS.prompts).rows([index])
        end = sampler.latents_at(unet, cond, [index], inputs=inputs)
        torch.testing.assert_close(screen.latents_PCHW[index], end[0], rtol=1e-4, atol=1e-5)
        x_BCHW, t = inputs[index % 2]
        whole, without = (sampler.predict(network, x_BCHW, t[None], cond) for network in (unet, pruned))
        errors.append(((without - whole).square().mean() / whole.square().mean()).item())
    assert screen.errors[block] == pytest.approx(sum(errors) / 3, rel=1e-3)
    assert list(screen.errors) == list(unet.kept_blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_change_nothing(kind):
    one, three = (screened(kind, batch_size)[2].errors for batch_size in (1, 3))
    assert one == pytest.approx(three, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_some_blocks_are_theirs_among_all(kind, tiny_clip_folder):
    """From the latents of the screen, too, which are the base's."""
    sampler, unet, screen = screened(kind)
    shared = PROMPTS, 4, Accelerator(cpu=True)
    metric = as_metric(ClipScorer(f"local-dir:{tiny_clip_folder}"))
    every = score_blocks(unet, sampler, metric, *shared)
    chosen = (every.blocks[3], every.blocks[1])
    some = score_blocks(unet, sampler, metric, *shared, blocks=chosen, latents_PCHW=screen.latents_PCHW)
    assert some.blocks == chosen
    torch.testing.assert_close(some.base_P, every.base_P, atol=0.05, rtol=0)
    for n, block in enumerate(chosen):
        torch.testing.assert_close(some.loss_NP[n], every.loss_NP[every.blocks.index(block)], atol=0.05, rtol=0)


def test_the_cheapest_blocks_are_left_until_they_save_enough():
    screen = Screen({"a": 1.0, "b": 0.1, "c": 0.6, "d": 0.0, "e": 0.9}, torch.zeros(1, 1, 1, 1))
    ms = {"a": 1.0, "b": 1.0, "c": 3.0, "d": 0.0, "e": 2.0}
    # Per millisecond: b 0.1, c 0.2, e 0.45, a 1; d saves nothing.
    assert screen.cheapest(ms, 4.0) == ("b", "c") and screen.cheapest(ms, 4.1) == ("b", "c", "e")
    assert screen.cheapest(ms, 0.5) == ("b", "c") and screen.cheapest(ms, 99) == ("a", "b", "c", "e")


def test_what_was_screened_out_goes_last_in_the_order_of_the_screen():
    nan = float("nan")
    values = [BlockValue("a", nan, nan, 1.0, screen_error=0.9), BlockValue("b", nan, nan, 1.0, screen_error=0.5),
              BlockValue("c", 30.0, 1.0, 1.0), BlockValue("d", -1.0, 1.0, 1.0)]  # fmt: skip
    taken = choose_removals(values, latency_ms=10.0, target_ms=6.5)
    assert [action.block for action in taken] == ["d", "c", "b", "a"]
    assert "screened out at an error of 50.0%" in taken[2].why


@pytest.mark.slow
def test_the_job_scores_what_the_screen_leaves(tmp_path, tiny_model):
    few = ["scoring.protocol=screened", "scoring.screen_margin=1.5", "search.target_fraction=0.9", "search.rounds=1"]
    done = run_job("+experiment=prune_unet", "name=few", f"root={tmp_path}", *SMALL, *tiny_model, *few)
    assert done.returncode in (0, 3), done.stderr
    files = (tmp_path / f"few/round-00/{name}.json" for name in ("scores", "latency", "decision"))
    scores, latency, decision = (json.loads(file.read_text()) for file in files)
    assert scores["protocol"]["name"] == "screened" and list(scores["screen"]) == list(latency["sites"])
    assert 0 < len(scores["sites"]) < len(latency["sites"])
    scored = {value["site"] for value in decision["values"] if value["delta_clip"] is not None}
    assert scored == set(scores["sites"])
    assert (tmp_path / "few/report.html").is_file()


def test_a_margin_that_cannot_be_is_refused(tmp_path, tiny_model):
    done = run_job("+experiment=prune_unet", f"root={tmp_path}", *tiny_model, "scoring.screen_margin=0.5")
    assert done.returncode == 1 and "scoring.screen_margin=0.5 must be at least 1" in done.stderr
