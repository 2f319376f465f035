"""Drawing part by part on a CPU: the same images, whatever the number of threads, and no block that is closed."""

import pytest
import torch

import slimstep.eval.cpu_parts
from scripts.random_transformers import small_sd3_pipeline
from slimstep.eval.cpu_parts import remove, twin
from slimstep.eval.sampling import Sampler
from slimstep.models.families.transformer.networks.sd3 import PrunableSD3Transformer2DModel
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.family import denoiser_of
from slimstep.models.networks import network_of
from tests.tiny import small_pipeline

PROMPTS = [f"prompt {letter}" for letter in "abcdefghijkl"]


@pytest.fixture(scope="module", params=["UNet", "transformer"])
def sampler(request):
    if request.param == "transformer":
        pipeline = small_sd3_pipeline()
        pipeline.transformer = PrunableSD3Transformer2DModel.from_unet(pipeline.transformer)
    else:
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
    return sampler.images(network_of(sampler.pipeline), PROMPTS, list(indices), block_mask)


def random_masks(sampler, seed):
    blocks = len(network_of(sampler.pipeline).kept_blocks)
    return torch.rand(8, blocks, generator=torch.Generator().manual_seed(seed)) < 0.7


def test_images_do_not_depend_on_the_number_of_threads(sampler, parts_of_two, threads):
    mask = random_masks(sampler, 0)
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
    mask = random_masks(sampler, 1)
    together = images(sampler, mask)
    threads(1)
    for first in range(0, 8, 2):
        pair = slice(first, first + 2)
        assert torch.equal(together[pair], images(sampler, mask[pair], range(8)[pair]))


@pytest.mark.parametrize("are_copied", [False, True])
def test_a_network_without_closed_blocks_is_the_masked_one(sampler, are_copied):
    network = network_of(sampler.pipeline)
    copied = {block: 2 + n for n, block in enumerate(network.copyable_blocks[:2])} if are_copied else {}
    network = network.with_architecture(copied, copy_init="same")
    denoiser = denoiser_of(network)
    inputs = denoiser.example(network, 2, generator=torch.Generator().manual_seed(0))
    for n, block in enumerate(network.kept_blocks):
        mask = torch.ones(2, len(network.kept_blocks), dtype=torch.bool)
        mask[:, n] = False
        without = twin(network)
        remove(without, [block])
        with torch.no_grad():
            assert torch.equal(denoiser(without, *inputs), denoiser(network, *inputs, block_mask_BN=mask)), block


def test_a_twin_shares_every_weight(sampler):
    unet = network_of(sampler.pipeline)
    pairs = zip(twin(unet).state_dict().values(), unet.state_dict().values(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)


def test_what_a_part_raises_is_raised_and_ends_the_others(sampler, parts_of_two, threads, monkeypatch):
    threads(2)
    noise = sampler.noise
    monkeypatch.setattr(sampler, "noise", lambda index: noise(index) * (torch.nan if index == 5 else 1))
    with pytest.raises(ValueError, match="finite"):
        images(sampler)
