"""Parameters and FLOPs of the published configurations."""

import pytest
import torch

from slimstep.models.cost import count_activation_bytes, count_gflops
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.family import denoiser_of
from slimstep.models.reference import CONFIGS
from tests.models.conftest import small_stock_unet


@pytest.mark.parametrize(("name", "gflops"), [("sd15", 803.3), ("sd21", 804.3), ("sdxl", 6761.2)])
def test_published_networks_cost_what_is_known(name, gflops):
    with torch.device("meta"):
        unet = PrunableUNet2DConditionModel(**CONFIGS[name])
    assert count_gflops(unet, 128 if name == "sdxl" else 64) == pytest.approx(gflops, abs=0.05)


def test_cost_grows_with_the_batch_and_falls_with_a_block():
    stock = small_stock_unet()
    unet = PrunableUNet2DConditionModel.from_unet(stock)
    whole = count_gflops(unet, latent_size=8)
    assert count_gflops(unet, latent_size=8, batch=2) == pytest.approx(2 * whole)
    assert count_gflops(stock, latent_size=8) == whole
    assert count_gflops(unet.with_architecture({"mid_block.attentions.0": 0}), latent_size=8) < whole


def test_counted_activations_are_those_a_forward_on_the_cpu_keeps():
    stock = small_stock_unet().train()
    denoiser = denoiser_of(stock)
    inputs = denoiser.example(stock, 2, tokens=5)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        return kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage()) and tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in stock.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        denoiser(stock, *inputs)
    there = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    assert count_activation_bytes(stock, 2, tokens=5) == pytest.approx(there, rel=0.1)
    assert count_activation_bytes(stock, 4, 5) == pytest.approx(2 * count_activation_bytes(stock, 2, 5), rel=0.01)
