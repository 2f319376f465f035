"""Stochastic depth: masks are drawn per sample and kind, and a probability of zero is the ordinary denoising loss."""

import pytest
import torch
from torch import nn

from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.noise_schedule import schedule_of
from slimstep.prune.stochastic_depth import StochasticDepth
from tests.tiny import DENOISER, WIDTH, no_caption, tiny_pipeline


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline("v_prediction")


@pytest.fixture(scope="module")
def unet(pipeline):
    return PrunableUNet2DConditionModel.from_unet(pipeline.unet)


def objective(pipeline, unet, **options):
    options = {"skip_prob": {"resnet": 0.3, "attention": 0.1}, **options}
    return StochasticDepth(DENOISER, schedule_of(pipeline.scheduler), no_caption(4), unet, **options)


def batch(size=4):
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(size, 4, 8, 8, generator=draw), torch.randn(size, 4, WIDTH, generator=draw)
    return {"latents": latents, "text": text, "progress": 0.5}


class Recorder(nn.Module):
    """A UNet that remembers the masks it was given."""

    def __init__(self, unet):
        super().__init__()
        self.kinds, self.kept_blocks, self.masks = unet.kinds, unet.kept_blocks, []
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, noisy, t, encoder_hidden_states, block_mask, return_dict):
        self.masks.append(block_mask)
        return (noisy,)


def test_blocks_are_skipped_at_the_probability_of_their_kind_independently_per_sample(pipeline, unet):
    recorder, training = Recorder(unet), objective(pipeline, unet)
    for seed in range(50):
        training(recorder, batch(16), torch.Generator().manual_seed(seed))
    open_BN = torch.cat(recorder.masks).float()
    is_resnet = torch.tensor([unet.kinds[block] == "resnet" for block in unet.kept_blocks])
    assert (1 - open_BN[:, is_resnet]).mean() == pytest.approx(0.3, abs=0.02)
    assert (1 - open_BN[:, ~is_resnet]).mean() == pytest.approx(0.1, abs=0.02)
    assert len({tuple(row) for row in open_BN.tolist()}) > 700, "rows share their mask"


def test_ramps_rise_over_depth_or_over_the_training(pipeline, unet):
    kinds = ["resnet", "attention", "resnet"]
    assert objective(pipeline, unet).skip_probs(kinds, 0.5).tolist() == pytest.approx([0.3, 0.1, 0.3])
    assert objective(pipeline, unet, ramp="depth").skip_probs(kinds, 0.5).tolist() == pytest.approx([0, 0.05, 0.3])
    assert objective(pipeline, unet, ramp="time").skip_probs(kinds, 0.5).tolist() == pytest.approx([0.15, 0.05, 0.15])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_without_skipping_it_is_the_denoising_loss_of_the_stock_unet(prediction_type):
    pipeline = tiny_pipeline(prediction_type)
    unet = PrunableUNet2DConditionModel.from_unet(pipeline.unet)
    training = objective(pipeline, unet, skip_prob={"resnet": 0, "attention": 0}, caption_dropout=0)
    loss, _ = training(unet, batch(), torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(0)
    t = torch.randint(1000, (4,), generator=draw)
    noise = torch.randn(4, 4, 8, 8, generator=draw)
    latents = batch()["latents"]
    target = {"epsilon": noise, "v_prediction": pipeline.scheduler.get_velocity(latents, noise, t), "sample": latents}
    pred = pipeline.unet(pipeline.scheduler.add_noise(latents, noise, t), t, batch()["text"]).sample
    torch.testing.assert_close(loss, (pred - target[prediction_type]).square().mean())


def test_with_the_teacher_alone_the_unpruned_network_has_no_loss(pipeline, unet):
    training = objective(pipeline, unet, skip_prob={"resnet": 0, "attention": 0}, teacher_weight=1.0)
    loss, metrics = training(unet, batch(), torch.Generator().manual_seed(0))
    assert loss == 0 and metrics["denoising"] > 0


def test_every_parameter_receives_a_gradient(pipeline, unet):
    """So that DistributedDataParallel needs no search for unused ones."""
    training = objective(pipeline, unet, skip_prob={"resnet": 0.9, "attention": 0.9})
    loss, _ = training(unet, batch(2), torch.Generator().manual_seed(0))
    loss.backward()
    assert all(p.grad is not None for p in unet.parameters())


@pytest.mark.parametrize(
    "options",
    [{"skip_prob": {"resnet": 1.0, "attention": 0}}, {"skip_prob": {"resnet": 0.1}}, {"ramp": "sideways"}],
)
def test_impossible_options_are_named(pipeline, unet, options):
    with pytest.raises(ValueError, match="skip_prob|ramp"):
        objective(pipeline, unet, **options)
