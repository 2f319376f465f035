"""Drawing part by part on a CPU: the same images, whatever the number of threads, and no block that is closed."""

import pytest
import torch

import slimstep.eval.cpu_parts
from slimstep.eval.cpu_parts import remove, twin
from slimstep.eval.sampling import Sampler
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from tests.models.conftest import small_inputs
from tests.tiny import small_pipeline

PROMPTS = [f"prompt {letter}" for letter in "abcdefghijkl"]


@pytest.fixture(scope="module")
def sampler():
    pipeline = small_pipeline()
    pipeline.unet = PrunableUNet2DConditionModel.from_unet(pipeline.unet)
    return Sampler(pipeline, steps=2, guidance_scale=2.0)


@pytest.fixture
def parts_of_two(monkeypatch):
    monkeypatch.setattr(slimstep.eval.cpu_parts, "LATENT_PIXELS", 2 * 8 * 8)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def images(sampler, block_mask=None, indices=range(8)):
    return sampler.images(sampler.pipeline.unet, PROMPTS, list(indices), block_mask)


def test_images_do_not_depend_on_the_number_of_threads(sampler, parts_of_two, threads):
    mask = torch.rand(8, 12, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[2:4] = mask[2]
    threads(1)
    whole, masked = images(sampler), images(sampler, mask)
    assert not torch.equal(whole, masked)
    for count in (2, 4):
        threads(count)
        assert torch.equal(images(sampler), whole) and torch.equal(images(sampler, mask), masked)


def test_rows_of_mixed_parts_do_not_see_each_other(sampler, parts_of_two, threads):
    """Every part of two rows holds two different masks, and runs beside another."""
    threads(2)
    mask = torch.rand(8, 12, generator=torch.Generator().manual_seed(1)) < 0.7
    together = images(sampler, mask)
    threads(1)
    for first in range(0, 8, 2):
        pair = slice(first, first + 2)
        assert torch.equal(together[pair], images(sampler, mask[pair], range(8)[pair]))


@pytest.mark.parametrize("architecture", [{}, {"mid_block.attentions.0": 3, "down_blocks.0.resnets.0": 2}])
def test_a_network_without_closed_blocks_is_the_masked_one(sampler, architecture):
    unet = sampler.pipeline.unet.with_architecture(architecture, copy_init="same")
    inputs = small_inputs(unet)
    for n, block in enumerate(unet.kept_blocks):
        mask = torch.ones(len(inputs["sample"]), len(unet.kept_blocks), dtype=torch.bool)
        mask[:, n] = False
        without = twin(unet)
        remove(without, [block])
        with torch.no_grad():
            assert torch.equal(without(**inputs).sample, unet(**inputs, block_mask=mask).sample), block


def test_a_twin_shares_every_weight(sampler):
    unet = sampler.pipeline.unet
    pairs = zip(twin(unet).state_dict().values(), unet.state_dict().values(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)


def test_what_a_part_raises_is_raised_and_ends_the_others(sampler, parts_of_two, threads, monkeypatch):
    threads(2)
    noise = sampler.noise
    monkeypatch.setattr(sampler, "noise", lambda index: noise(index) * (torch.nan if index == 5 else 1))
    with pytest.raises(ValueError, match="finite"):
        images(sampler)
