"""Narrow decoders: the sliced one is the wide one with the other channels masked; widths, choices, configurations."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from models.decoding import ImageDecoder
from models.reference import VAE_CONFIGS
from models.vae import NarrowAutoencoderKL
from prune.decoder import (
    CHOICES,
    all_groups,
    choose_channels,
    name_of,
    narrow_widths,
    narrowed,
    traced,
    writers,
)

SMALL = {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 4, "layers_per_block": 1}


def vae_like(name: str, **changes) -> AutoencoderKL:
    """A published autoencoder's configuration at small widths, with random weights; norms that are not the identity."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**{**VAE_CONFIGS[name], **SMALL, **changes}).eval().requires_grad_(False)
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.copy_(1 + 0.2 * torch.randn_like(module.weight))
            module.bias.copy_(0.2 * torch.randn_like(module.bias))
    return vae


class MaskedNorm(nn.Module):
    """A GroupNorm of the kept channels alone; the others are zero."""

    def __init__(self, norm: nn.GroupNorm, kept: list[int]):
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x):
        norm, kept, out = self.norm, self.kept, torch.zeros_like(x)
        args = norm.num_groups, norm.weight[kept], norm.bias[kept], norm.eps
        out[:, kept] = nn.functional.group_norm(x[:, kept], *args)
        return out


def masked(vae: AutoencoderKL, channels) -> nn.Module:
    """The wide decoder in which nothing writes the other channels, and no norm sees them."""
    decoder, graph = traced(vae)
    decoder.requires_grad_(False)
    for group in list(all_groups(graph, decoder)):
        kept = channels[name_of(decoder, group)]
        for layer in writers(group):
            is_convolution = isinstance(layer, nn.Conv2d)
            keep = torch.zeros(len(group[0].idxs)).index_fill_(0, torch.tensor(kept), 1.0)
            keep = keep[:, None, None] if is_convolution else keep
            layer.register_forward_hook(lambda module, inputs, output, keep=keep: output * keep)
        norms = {item.dep.target.module for item in group if isinstance(item.dep.target.module, nn.GroupNorm)}
        for path, module in list(decoder.named_modules()):
            if module in norms:
                decoder.set_submodule(path, MaskedNorm(module, kept))
    return decoder


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", VAE_CONFIGS)
def test_the_sliced_decoder_is_the_wide_one_with_the_other_channels_masked(name, choice):
    vae = vae_like(name)
    z = torch.randn(2, vae.config.latent_channels, 6, 6)
    widths = narrow_widths(vae, 0.5)
    channels = choose_channels(vae, widths, choice, z)
    narrow = narrowed(vae, channels, widths)
    with torch.no_grad():
        inputs = ImageDecoder(vae).inputs(z)
        assert torch.allclose(narrow.decoder(inputs), masked(vae, channels)(inputs), atol=1e-5)
        assert not torch.allclose(narrow.decoder(inputs), vae.decoder(inputs), atol=1e-2)


def test_all_channels_kept_is_the_wide_decoder_bit_for_bit():
    vae = vae_like("sd15")
    z, widths = torch.randn(1, 4, 8, 8), narrow_widths(vae, 1.0)
    assert torch.equal(narrowed(vae, choose_channels(vae, widths, "magnitude"), widths).decode(z)[0], vae.decode(z)[0])


@pytest.mark.parametrize("shares", [[0.5, 0.75, 0.5, 0.5], [1.0, 0.5, 0.25, 0.25], [0.5, 1.0, 0.5, 0.5]])
def test_levels_may_have_their_own_share(shares, tmp_path):
    """Also where two narrow levels come out equal (8, 8): the shortcut between them stays."""
    vae = vae_like("sd15")
    z, widths = torch.randn(1, 4, 6, 6), narrow_widths(vae, shares)
    channels = choose_channels(vae, widths, "energy", z)
    narrow = narrowed(vae, channels, widths)
    with torch.no_grad():
        inputs = ImageDecoder(vae).inputs(z)
        assert torch.allclose(narrow.decoder(inputs), masked(vae, channels)(inputs), atol=1e-5)
    narrow.save_pretrained(tmp_path)
    again = NarrowAutoencoderKL.from_pretrained(tmp_path, disable_mmap=True)
    assert torch.equal(again.decode(z)[0], narrow.decode(z)[0])


@pytest.mark.parametrize(
    ("width", "told"),
    [
        (0.3, "8 channels are normalised in 4 groups, which can keep 0.5, 1"),
        (0.0, "can keep 0.5, 1"),
        ([0.5, 0.5], "has 2 values; this decoder has 4 levels"),
        ([0.5, 0.5, 0.5, 0.25], "levels 2 and 3 are one residual stream of 32 channels"),
    ],
)
def test_widths_that_cannot_be_are_refused_with_those_that_can(width, told):
    with pytest.raises(ValueError, match=told):
        narrow_widths(vae_like("sd15"), width)


def test_every_norm_group_keeps_as_many_channels():
    vae = vae_like("sd15")
    widths = narrow_widths(vae, 0.5)
    for name, kept in choose_channels(vae, widths, "magnitude").items():
        if "to_" not in name:  # nothing normalises the inside of the attention
            total = 2 * len(kept)
            assert [sum(c // (total // 4) == part for c in kept) for part in range(4)] == [len(kept) // 4] * 4, name


@pytest.mark.parametrize("choice", ["energy", "taylor", "magnitude"])
def test_channels_that_do_nothing_go_first(choice):
    """Planted: a convolution's weights and bias are zero for half of its channels, in every norm group."""
    vae = vae_like("sd15")
    dead = [c for c in range(32) if c % 8 in (1, 4, 5, 6)]
    conv = vae.decoder.mid_block.resnets[0].conv1
    conv.weight[dead], conv.bias[dead] = 0, 0
    vae.decoder.mid_block.resnets[0].conv2.weight[:, dead] = 0
    norm = vae.decoder.mid_block.resnets[0].norm2
    norm.weight[dead], norm.bias[dead] = 0, 0
    widths = narrow_widths(vae, 0.5)
    kept = choose_channels(vae, widths, choice, torch.randn(4, 4, 6, 6))["mid_block.resnets.0.conv1"]
    assert not set(kept) & set(dead)


def test_the_encoder_and_what_is_around_the_decoder_stay_bit_for_bit():
    vae = vae_like("sdxl")
    widths = narrow_widths(vae, 0.5)
    state = narrowed(vae, choose_channels(vae, widths, "random"), widths).state_dict()
    others = {key: value for key, value in vae.state_dict().items() if not key.startswith("decoder.")}
    assert all(torch.equal(state[key], value) for key, value in others.items()) and len(others) > 20


def test_half_of_stable_diffusions_decoder_has_a_quarter_of_its_parameters():
    """12,387,459 of 49,490,179, counted on the meta device; FLOPs 3.94 times fewer."""
    with torch.device("meta"):
        config = VAE_CONFIGS["sd15"]
        wide = AutoencoderKL(**config)
        narrow = NarrowAutoencoderKL(**config, decoder_block_out_channels=narrow_widths(wide, 0.5))
    counts = [sum(p.numel() for p in vae.decoder.parameters()) for vae in (wide, narrow)]
    assert counts == [49_490_179, 12_387_459]


def test_a_saved_one_is_the_same_one(tmp_path):
    vae = vae_like("flux")
    widths = narrow_widths(vae, 0.5)
    narrow = narrowed(vae, choose_channels(vae, widths, "first"), widths)
    narrow.save_pretrained(tmp_path)
    again = NarrowAutoencoderKL.from_pretrained(tmp_path, disable_mmap=True)
    assert again.config.decoder_block_out_channels == list(widths) and again.config.shift_factor == 0.1159
    z, x = torch.randn(1, 16, 8, 8), torch.randn(1, 3, 32, 32)
    assert torch.equal(again.decode(z)[0], narrow.decode(z)[0])
    assert torch.equal(again.encode(x)[0].mean, vae.encode(x)[0].mean)
    copied = NarrowAutoencoderKL.from_config(copy.deepcopy(dict(again.config)))
    assert copied.decoder.conv_in.out_channels == 16
