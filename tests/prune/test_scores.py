"""Block scores: masks measure what surgery does, whatever the batch, and the table is honest about its error."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf

from slimstep.data.prompts import PromptSet
from slimstep.engine.checked import CONFIGS
from slimstep.eval.job import load_metrics
from slimstep.eval.metrics.clip import ClipScorer, psnr
from slimstep.eval.metrics.metric import as_metric
from slimstep.eval.sampling import Sampler
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.prune.scores import picture_error, psnr_of_others, score_blocks
from tests.tiny import small_pipeline

PROMPTS = PromptSet(("a red dot", "two cats", "a big tree", "some rain"), "four")


@pytest.fixture(scope="module")
def parts(tiny_clip_folder):
    pipeline = small_pipeline()
    pipeline.unet = PrunableUNet2DConditionModel.from_unet(pipeline.unet)
    return pipeline.unet, Sampler(pipeline, steps=1, guidance_scale=2.0), ClipScorer(f"local-dir:{tiny_clip_folder}")


def score(parts, batch_size, metric=None):
    unet, sampler, scorer = parts
    return score_blocks(unet, sampler, as_metric(metric or scorer), PROMPTS, batch_size, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def table(parts):
    return score(parts, batch_size=8)


def test_a_block_scores_what_the_pruned_unet_loses(parts, table):
    unet, sampler, scorer = parts
    texts = scorer.text(PROMPTS.prompts)
    base = scorer.score(sampler.images(unet, PROMPTS.prompts, range(4)), texts)
    torch.testing.assert_close(table.base_P, base)
    for n in (0, 1, 6, 11):
        pruned = unet.with_architecture({table.blocks[n]: 0})
        without = scorer.score(sampler.images(pruned, PROMPTS.prompts, range(4)), texts)
        torch.testing.assert_close(table.loss_NP[n], base - without, atol=0.05, rtol=0)


def test_by_image_error_a_block_loses_the_squared_error_of_its_pictures(parts):
    described = {"image_error": OmegaConf.load(CONFIGS / "metric/image_error.yaml")}
    config = OmegaConf.create({"metrics": described, "evaluation": {"preferences": None}})
    table = score(parts, 8, load_metrics(config, parts[2], torch.device("cpu"))["image_error"])
    assert not table.base_P.any()
    torch.testing.assert_close(table.loss_NP, 100 * 10 ** (-table.psnr_NP / 10), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("batch_size", [3, 5])
def test_the_batch_size_changes_scores_by_rounding_alone(parts, table, batch_size):
    other = score(parts, batch_size)
    torch.testing.assert_close(other.base_P, table.base_P, atol=0.05, rtol=0)
    assert (other.loss_NP - table.loss_NP).abs().median() < 1e-3


def test_the_record_holds_paired_means_errors_and_the_protocol(table):
    record = table.record({"steps": 2})
    first = record["sites"][table.blocks[0]]
    assert first["delta_clip"] == pytest.approx(table.loss_NP[0].mean().item(), abs=1e-5)
    assert first["se"] == pytest.approx(table.loss_NP[0].std().item() / 2, abs=1e-5)
    assert record["protocol"] == {"steps": 2} and first["n"] == 4 and -1 <= record["rank_agreement_of_halves"] <= 1


def test_the_error_of_a_picture_is_nothing_for_the_same_and_one_for_an_unrelated_one(table):
    same = torch.full((1, 3, 4, 4), 128, dtype=torch.uint8)
    assert picture_error(psnr(same, same).item(), 8.0) == pytest.approx(0, abs=1e-6)
    assert picture_error(8.0, 8.0) == pytest.approx(1, abs=1e-4)
    assert picture_error(18.0, 8.0) == pytest.approx(0.1, abs=1e-4)


def test_the_record_holds_the_distance_to_other_prompts_and_every_picture_in_its_units(table):
    record = table.record({})
    others = record["base"]["psnr_to_other_prompts"]
    for block in record["sites"].values():
        assert block["picture_error"] == picture_error(block["psnr"], others)
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    two = psnr(images[[0, 1, 2, 3]], images[[2, 3, 0, 1]]).mean().item()
    assert psnr_of_others(images, ["a", "a", "b", "b"]) == pytest.approx(two)


def test_of_one_prompt_there_is_no_other(table):
    assert replace(table, others_psnr=psnr_of_others(torch.zeros(2, 3, 4, 4), ["a", "A"])).record({})["base"] == {
        **table.record({})["base"], "psnr_to_other_prompts": None}  # fmt: skip
