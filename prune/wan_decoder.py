"""Wan's decoder as torch-pruning can follow it: what diffusers computes by one convolution and then takes apart, the
queries, keys and values of an attention and the two frames that one becomes, is computed by several. Frames are taken
by index, for slices of them it takes for slices of channels (findings/torch_pruning_takes_frames_for_channels.sh), and
norms do without an expansion, which it takes for repeated heads.

Axes: B batch, C channels, F frames, H and W latent size.
"""

import copy
import math
from collections.abc import Iterator, Mapping

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanRMS_norm
from torch import Tensor, nn

PARTS = {"to_qkv": ("to_q", "to_k", "to_v"), "time_conv": ("even", "odd")}  # of a convolution, and of the split ones


class PlainNorm(nn.Module):
    """A WanRMS_norm in plain arithmetic."""

    def __init__(self, norm: WanRMS_norm):
        super().__init__()
        self.gamma, self.scale = norm.gamma, norm.scale

    def forward(self, x: Tensor) -> Tensor:
        length = x.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12)  # torch's normalize has this
        return x / length * self.scale * self.gamma


class SplitAttention(nn.Module):
    """A WanAttentionBlock in plain arithmetic."""

    def __init__(self, block: WanAttentionBlock):
        super().__init__()
        self.norm, self.proj, self.width = block.norm, block.proj, block.dim
        self.to_q, self.to_k, self.to_v = parts_of(block.to_qkv, 3)

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        frames_bCHW = self.norm(x_BCFHW.transpose(1, 2).flatten(0, 1))
        q, k, v = (layer(frames_bCHW).flatten(2) for layer in (self.to_q, self.to_k, self.to_v))
        weights = (q.transpose(1, 2) @ k / math.sqrt(self.width)).softmax(-1)
        seen_bCHW = (v @ weights.transpose(1, 2)).unflatten(2, frames_bCHW.shape[2:])
        return x_BCFHW + self.proj(seen_bCHW).unflatten(0, (len(x_BCFHW), -1)).transpose(1, 2)


class SplitResample(nn.Module):
    """A WanResample that makes two frames of each but the first."""

    mode = "upsample2d"  # its time is its own

    def __init__(self, upsampler: WanResample):
        super().__init__()
        self.resample = upsampler.resample
        self.even, self.odd = parts_of(upsampler.time_conv, 2)

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        frames, device = x_BCFHW.shape[2], x_BCFHW.device
        if frames > 1:
            # Frames by index and sums with zeros: slices and concatenations torch-pruning takes for those of channels.
            turns = (torch.arange(*ends, device=device) for ends in ((0, 1), (1, frames)))
            begin, rest = (x_BCFHW.index_select(2, turn) for turn in turns)
            pairs = [nn.functional.interpolate(layer(rest), scale_factor=(2, 1, 1)) for layer in (self.even, self.odd)]
            even, odd = (nn.functional.pad(pair, (0, 0, 0, 0, 1, 0)) for pair in pairs)
            turn_F = torch.arange(2 * frames - 1, device=device)[:, None, None]
            begin = nn.functional.pad(begin, (0, 0, 0, 0, 0, 2 * frames - 2))
            x_BCFHW = begin + even * (turn_F % 2 == 1) + odd * (turn_F % 2 == 0)
        frames_bCHW = self.resample(x_BCFHW.transpose(1, 2).flatten(0, 1))
        return frames_bCHW.unflatten(0, (len(x_BCFHW), -1)).transpose(1, 2)


def split(decoder: nn.Module) -> nn.Module:
    """Changes a WanDecoder3d so, in place."""
    for path, norm in [*decoder.named_modules()]:
        if isinstance(norm, WanRMS_norm):
            parent, _, name = path.rpartition(".")
            setattr(decoder.get_submodule(parent), name, PlainNorm(norm))
    attentions = decoder.mid_block.attentions
    for k, block in enumerate(attentions):
        attentions[k] = SplitAttention(block)
    for block in decoder.up_blocks:
        for k, upsampler in enumerate(block.upsamplers or ()):
            if upsampler.mode == "upsample3d":
                block.upsamplers[k] = SplitResample(upsampler)
    return decoder


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a split decoder by diffusers' names."""
    made = {key: value for key, value in weights.items() if not own_part(key)}
    for key in filter(own_part, weights):
        path, part, kind = key.rsplit(".", 2)
        name = next(name for name, parts in PARTS.items() if part in parts)
        made[f"{path}.{name}.{kind}"] = torch.cat([weights[f"{path}.{part}.{kind}"] for part in PARTS[name]])
    return made


def own_part(key: str) -> bool:
    return key.rsplit(".", 2)[-2] in {part for parts in PARTS.values() for part in parts}


def parts_of(layer: nn.Conv2d | nn.Conv3d, count: int) -> Iterator[nn.Conv2d | nn.Conv3d]:
    """So many convolutions, each with its share of the output channels."""
    assert layer.bias is not None
    for weight, bias in zip(layer.weight.chunk(count), layer.bias.chunk(count), strict=True):
        part = copy.deepcopy(layer)
        part.out_channels = len(weight)
        part.weight, part.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
        yield part


def gains(decoder: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """The gains of all norms, which torch-pruning does not know, and the dimension of their channels."""
    return [(norm.gamma, 0) for norm in decoder.modules() if isinstance(norm, PlainNorm)]
