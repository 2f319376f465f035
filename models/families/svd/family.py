"""Stable Video Diffusion's network on its own: its pipelines, which make a video of an image, no job drives yet."""

from torch import nn

from slimstep.models.denoiser import Denoiser
from slimstep.models.families.svd.denoiser import SpatioTemporalDenoiser
from slimstep.models.families.svd.network import PrunableUNetSpatioTemporalConditionModel

NETWORK = PrunableUNetSpatioTemporalConditionModel


def owns(network: nn.Module) -> bool:
    return True


def denoiser(network: nn.Module, prediction_type: str, sample_shape: tuple[int, ...]) -> Denoiser:
    return SpatioTemporalDenoiser(prediction_type, sample_shape)


def channels(network: nn.Module) -> int:
    """Of what is denoised; the network is given the first frame's beside them."""
    return network.config.out_channels


def frames(network: nn.Module) -> int:
    return network.config.num_frames


def shrinks(network: nn.Module) -> int:
    return 2 ** (len(network.config.block_out_channels) - 1)
