"""Parameters and FLOPs of the published configurations."""

import pytest
import torch

from slimstep.models.cost import count_gflops
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
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
