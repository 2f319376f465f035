"""Input–output similarities: what they are, and that the search goes by them."""

import json
from functools import cache

import pytest
import torch
from accelerate import Accelerator

from scripts.random_transformers import small_sd3_pipeline
from slimstep.data.prompts import PromptSet
from slimstep.eval.sampling import Sampler
from slimstep.models.families.transformer.networks.sd3 import PrunableSD3Transformer2DModel
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.networks import network_of
from slimstep.prune.similarity import block_similarities
from tests.jobs import run_job
from tests.prune.test_job import SMALL
from tests.tiny import small_pipeline

PROMPTS = PromptSet(("a", "b", "c"), "letters")
KINDS = {"UNet": (small_pipeline, PrunableUNet2DConditionModel, "mid_block.attentions.0"),
         "SD3": (small_sd3_pipeline, PrunableSD3Transformer2DModel, "transformer_blocks.2")}  # fmt: skip


@cache
def made(kind):
    make, network, block = KINDS[kind]
    pipeline = make()
    return pipeline, network.from_unet(network_of(pipeline)), block


def similarities(pipeline, unet, batch_size=2, guidance=2.5, steps=2):
    return block_similarities(unet, Sampler(pipeline, steps, guidance), PROMPTS, batch_size, Accelerator(cpu=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_does_nothing_is_as_its_input(kind):
    pipeline, unet, block = made(kind)
    idle = unet.with_architecture({})
    idle.zero_init(idle.get_submodule(block))
    found = similarities(pipeline, idle)
    assert found[block] == pytest.approx(1) and list(found) == list(idle.kept_blocks)
    assert max((value, name) for name, value in found.items() if value is not None)[1] == block


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_batches_change_nothing(kind, guidance):
    pipeline, unet, _ = made(kind)
    found = (similarities(pipeline, unet, size, guidance) for size in (1, 3))
    one, three = ({block: value for block, value in of.items() if value is not None} for of in found)
    assert one == pytest.approx(three, rel=1e-4)


def test_of_two_streams_the_image_counts():
    pipeline, unet, block = made("SD3")
    sampler, seen = Sampler(pipeline, 1, 1.0), []
    hook = lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"], output[1]))  # noqa: E731
    with unet.get_submodule(block).register_forward_hook(hook, with_kwargs=True):
        for index in range(3):
            sampler.latents_at(unet, sampler.encode(PROMPTS.prompts).rows([index]), [index])
    by_hand = [torch.cosine_similarity(x.flatten(), y.flatten(), dim=0).item() for x, y in seen]
    assert len(by_hand) == 3
    assert similarities(pipeline, unet, guidance=1.0, steps=1)[block] == pytest.approx(sum(by_hand) / 3, rel=1e-4)


def test_a_resnet_that_changes_the_channels_has_none():
    pipeline, unet, _ = made("UNet")
    found = similarities(pipeline, unet)
    assert {block for block, value in found.items() if value is None} == set(unet.skip_rules)


@pytest.mark.slow
def test_the_job_removes_what_changes_least(tmp_path, tiny_model):
    done = run_job("+experiment=prune_unet", "name=alike", f"root={tmp_path}", *SMALL, *tiny_model, "search=similarity",
                   "search.rounds=1")  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    run = tmp_path / "alike"
    found = json.loads((run / "round-00/similarities.json").read_text())["blocks"]
    actions = [action["site"] for action in json.loads((run / "round-00/decision.json").read_text())["actions"]]
    ranked = sorted((block for block, value in found.items() if value is not None), key=found.get, reverse=True)
    assert actions and actions == [block for block in ranked if block in actions]
    assert actions[0] == ranked[0] and not (run / "round-00/scores.json").exists()
    assert len(json.loads((run / "prompts.json").read_text())["calibration_prompts"]) == 4
    rule = ["search=similarity", "plan=true", f"root={tmp_path}"]
    planned = run_job("+experiment=prune_unet", *SMALL, *tiny_model, *rule)
    assert "round-00/similarities.json" in planned.stdout
