"""A LoRA made for the stock UNet, on a pruned one."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers

from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.lora import fuse_lora
from slimstep.models.pipeline import with_unet
from tests.loras import draw_lora
from tests.models.conftest import paint, small_stock_unet


@pytest.fixture
def lora_folder(tmp_path):
    """A LoRA of the stock UNet's attention projections and ResNet convolutions, with weights that show."""
    weights = draw_lora(small_stock_unet(), ["to_q", "to_v", "to_out.0", "conv1"])
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=convert_state_dict_to_diffusers(weights))
    return tmp_path


def prunable(pipeline, architecture, **options):
    return with_unet(pipeline, PrunableUNet2DConditionModel.from_unet(small_stock_unet(), architecture, **options))


def test_on_the_unpruned_unet_all_of_it_fits(pipeline, lora_folder):
    unadapted = paint(pipeline)
    unpruned = prunable(pipeline, {})
    fit = fuse_lora(unpruned, lora_folder)
    assert len(fit.applied) == 16 * 6 + 22 and not fit.left_out
    pipeline.load_lora_weights(lora_folder)
    assert not torch.allclose(paint(unpruned), unadapted, rtol=0, atol=1e-2)
    torch.testing.assert_close(paint(unpruned), paint(pipeline), rtol=0, atol=1e-4)


def test_what_was_pruned_is_listed_and_the_rest_is_applied(pipeline, lora_folder):
    block = "mid_block.attentions.0"
    pruned = prunable(pipeline, {block: 0})
    before = paint(pruned)
    fit = fuse_lora(pruned, lora_folder)
    assert len(fit.left_out) == 6 and all(path.startswith(f"{block}.") for path in fit.left_out)
    adapted = paint(pruned)
    assert not torch.equal(adapted, before)
    whole = prunable(pipeline, {})
    fuse_lora(whole, lora_folder)
    mask = torch.tensor([[s != block for s in whole.unet.kept_blocks]] * 2)
    plain = whole.unet.forward
    whole.unet.forward = lambda *args, **kwargs: plain(*args, block_mask=mask, **kwargs)
    assert torch.equal(paint(whole), adapted), "pruned, then adapted, is not adapted, then pruned"


def test_copies_stay_as_they_are(pipeline, lora_folder):
    block = "mid_block.attentions.0"
    deeper = prunable(pipeline, {block: 2})
    before = {key: value.clone() for key, value in deeper.unet.state_dict().items()}
    fit = fuse_lora(deeper, lora_folder)
    assert not fit.left_out and not [path for path in fit.applied if ".copies." in path]
    copies = [key for key in before if ".copies." in key]
    assert copies and all(torch.equal(before[key], deeper.unet.state_dict()[key]) for key in copies)


def test_a_lora_of_which_nothing_fits_is_an_error(pipeline, lora_folder):
    unet = PrunableUNet2DConditionModel.from_unet(small_stock_unet())
    with pytest.raises(ValueError, match="has no weights for this UNet"):
        fuse_lora(with_unet(pipeline, unet.with_architecture(dict.fromkeys(unet.blocks, 0))), lora_folder)
