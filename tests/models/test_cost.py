"""Parameters and FLOPs of the published configurations."""

import pytest
import torch

from models.cost import count_gflops
from models.unet import PrunableUNet2DConditionModel
from tests.models.conftest import small_stock_unet
from tests.models.test_unet import SDXL_CONFIG


@pytest.mark.parametrize(
    ("config", "gflops"), [({"cross_attention_dim": 768, "sample_size": 64}, 803.3), (SDXL_CONFIG, 6761.2)]
)
def test_published_networks_cost_what_is_known(config, gflops):
    with torch.device("meta"):
        unet = PrunableUNet2DConditionModel(**config)
    assert count_gflops(unet) == pytest.approx(gflops, abs=0.05)


def test_cost_grows_with_the_batch_and_falls_with_every_block():
    unet = PrunableUNet2DConditionModel.from_unet(small_stock_unet())
    whole = count_gflops(unet, latent_size=8)
    assert count_gflops(unet, latent_size=8, batch=2) == pytest.approx(2 * whole)
    assert count_gflops(small_stock_unet(), latent_size=8) == whole
    for site in unet.sites[1::18]:
        assert count_gflops(unet.with_depths({site: 0}), latent_size=8) < whole
