"""Pruned decoders: before training each is the teacher decoder with the other channels masked; widths, importance,
configurations."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch import nn

from slimstep.distill.decoder import DecoderDistillation
from slimstep.eval.decoders import decoder_gflops
from slimstep.models.decoding import ImageDecoder, decoder_of
from slimstep.models.described import SVD_VAE
from slimstep.models.reference import VAE_CONFIGS
from slimstep.models.vae import NarrowAutoencoderKL, NarrowAutoencoderKLTemporalDecoder
from slimstep.prune.config import IMPORTANCE, NORM_GROUPS
from slimstep.prune.decoder import all_groups, choose_channels, name_of, pruned_vae, pruned_widths, traced, writers

SMALL = {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 4, "layers_per_block": 1}


def vae_like(name: str, **changes) -> AutoencoderKL:
    """A published autoencoder's configuration at small widths, with random weights; norms that are not the identity."""
    torch.manual_seed(0)
    return with_other_norms(AutoencoderKL(**{**VAE_CONFIGS[name], **SMALL, **changes}))


def with_other_norms(vae: nn.Module) -> nn.Module:
    for module in vae.eval().requires_grad_(False).modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.copy_(1 + 0.2 * torch.randn_like(module.weight))
            module.bias.copy_(0.2 * torch.randn_like(module.bias))
    return vae


def temporal_vae(widths: tuple[int, ...] = (64, 128, 128)) -> AutoencoderKLTemporalDecoder:
    """Stable Video Diffusion's at small widths; blends of time and space that are not all alike."""
    torch.manual_seed(0)
    levels = ("DownEncoderBlock2D",) * len(widths)
    vae = AutoencoderKLTemporalDecoder(block_out_channels=widths, down_block_types=levels, layers_per_block=2)
    for name, parameter in vae.named_parameters():
        if name.endswith("mix_factor"):
            nn.init.normal_(parameter)
    return with_other_norms(vae)


class ThinnedNorm(nn.Module):
    """A GroupNorm of the kept channels alone, in as many groups; the others are zero."""

    def __init__(self, norm: nn.GroupNorm, kept: list[int]):
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x):
        norm, kept, out = self.norm, self.kept, torch.zeros_like(x)
        args = norm.num_groups, norm.weight[kept], norm.bias[kept], norm.eps
        out[:, kept] = nn.functional.group_norm(x[:, kept], *args)
        return out


class MaskedNorm(nn.Module):
    """The teacher decoder's own GroupNorm, of all channels; what is not kept is zero afterwards."""

    def __init__(self, norm: nn.GroupNorm, kept: list[int]):
        super().__init__()
        self.norm, self.mask = norm, torch.zeros(norm.num_channels).index_fill_(0, torch.tensor(kept), 1.0)

    def forward(self, x):
        return self.norm(x) * self.mask.view(-1, *[1] * (x.dim() - 2))


def masked(vae: AutoencoderKL, channels, norm_groups: str) -> nn.Module:
    """The teacher decoder in which nothing writes the other channels.

    With whole groups its norms are its own; per group they do not see the other channels.
    """
    decoder, graph = traced(vae)
    decoder.requires_grad_(False)
    for group in list(all_groups(graph, decoder)):
        kept = channels[name_of(decoder, group)]
        for layer in writers(group):
            axes = len(layer.kernel_size) if isinstance(layer, (nn.Conv2d, nn.Conv3d)) else 0
            keep = torch.zeros(len(group[0].idxs)).index_fill_(0, torch.tensor(kept), 1.0)
            keep = keep.view(-1, *[1] * axes)
            layer.register_forward_hook(lambda module, inputs, output, keep=keep: output * keep)
        norms = {item.dep.target.module for item in group if isinstance(item.dep.target.module, nn.GroupNorm)}
        for path, module in list(decoder.named_modules()):
            if module in norms:
                kind = MaskedNorm if norm_groups == "whole" else ThinnedNorm
                decoder.set_submodule(path, kind(module, kept))
    return decoder


@pytest.mark.parametrize("norm_groups", NORM_GROUPS)
@pytest.mark.parametrize("choice", IMPORTANCE)
@pytest.mark.parametrize("name", VAE_CONFIGS)
def test_the_pruned_decoder_is_the_teacher_decoder_with_the_other_channels_masked(name, choice, norm_groups):
    vae = vae_like(name)
    z = torch.randn(2, vae.config.latent_channels, 6, 6)
    widths = pruned_widths(vae, 0.5, norm_groups)
    channels = choose_channels(vae, widths, choice, z, norm_groups=norm_groups)
    pruned = pruned_vae(vae, channels, widths, norm_groups)
    with torch.no_grad():
        inputs = ImageDecoder(vae).inputs(z)
        assert torch.allclose(pruned.decoder(inputs), masked(vae, channels, norm_groups)(inputs), atol=1e-5)
        assert not torch.allclose(pruned.decoder(inputs), vae.decoder(inputs), atol=1e-2)


@pytest.mark.parametrize("norm_groups", NORM_GROUPS)
@pytest.mark.parametrize("choice", ["magnitude", "taylor", "activation_energy"])
def test_so_is_a_pruned_temporal_decoder_in_space_and_time(choice, norm_groups, tmp_path):
    """Also where two pruned levels come out equal: the shortcut between them stays."""
    vae = temporal_vae()
    z = torch.randn(2, 4, 3, 4, 4)
    widths = pruned_widths(vae, [1.0, 0.5, 0.5], norm_groups)
    channels = choose_channels(vae, widths, choice, z, norm_groups=norm_groups)
    assert {".spatial_res_block.", ".temporal_res_block."} <= {f".{name.split('.')[-2]}." for name in channels}
    pruned = pruned_vae(vae, channels, widths, norm_groups)
    pruned.save_pretrained(tmp_path)
    again = NarrowAutoencoderKLTemporalDecoder.from_pretrained(tmp_path, disable_mmap=True)
    teacher, student, loaded = (decoder_of(one) for one in (vae, pruned, again))
    teacher.decoder = masked(vae, channels, norm_groups)
    with torch.no_grad():
        assert torch.allclose(student(z), teacher(z), atol=1e-5)
        assert not torch.allclose(student(z), decoder_of(vae)(z), atol=1e-2)
        assert torch.equal(loaded(z), student(z))
    assert torch.equal(again.encode(x := torch.randn(1, 3, 16, 16))[0].mean, vae.encode(x)[0].mean)


def test_a_temporal_decoder_has_widths_that_diffusers_can_make_alone():
    assert pruned_widths(temporal_vae(), 0.5) == (32, 64, 64)
    with pytest.raises(ValueError, match="diffusers makes it of multiples of 32 channels alone: 0.5, 1"):
        pruned_widths(temporal_vae(), 0.25)
    (vae := temporal_vae()).register_to_config(layers_per_block=1)
    with pytest.raises(ValueError, match="layers_per_block=1: diffusers never runs the attention"):
        pruned_widths(vae, 0.5)


def test_all_channels_kept_is_the_wide_decoder_bit_for_bit():
    vae = vae_like("sd15")
    z, widths = torch.randn(1, 4, 8, 8), pruned_widths(vae, 1.0)
    same = pruned_vae(vae, choose_channels(vae, widths, "magnitude"), widths)
    assert torch.equal(same.decode(z)[0], vae.decode(z)[0])


@pytest.mark.parametrize("norm_groups", NORM_GROUPS)
@pytest.mark.parametrize("shares", [[0.5, 0.75, 0.5, 0.5], [1.0, 0.5, 0.25, 0.25], [0.5, 1.0, 0.5, 0.5]])
def test_levels_may_have_their_own_share(shares, norm_groups, tmp_path):
    """Also where two pruned levels come out equal (8, 8): the shortcut between them stays."""
    vae = vae_like("sd15")
    z, widths = torch.randn(1, 4, 6, 6), pruned_widths(vae, shares, norm_groups)
    channels = choose_channels(vae, widths, "activation_energy", z, norm_groups=norm_groups)
    pruned = pruned_vae(vae, channels, widths, norm_groups)
    with torch.no_grad():
        inputs = ImageDecoder(vae).inputs(z)
        assert torch.allclose(pruned.decoder(inputs), masked(vae, channels, norm_groups)(inputs), atol=1e-5)
    pruned.save_pretrained(tmp_path)
    again = NarrowAutoencoderKL.from_pretrained(tmp_path, disable_mmap=True)
    assert torch.equal(again.decode(z)[0], pruned.decode(z)[0])


@pytest.mark.parametrize(
    ("width", "norm_groups", "message"),
    [
        (0.3, "whole", "8 channels are normalised in 4 groups, and whole groups stay or go: 0.25, 0.5, 0.75, 1"),
        (0.3, "per_group", "8 channels are normalised in 4 groups, and every group keeps the same share: 0.5, 1"),
        ([0.5, 0.5], "whole", r"has 2 values; this decoder has 4 levels: \(8, 16, 32, 32\)"),
        ([0.5, 0.5, 0.5, 0.25], "whole", "levels 2 and 3 are one residual stream of 32 channels"),
    ],
)
def test_widths_that_cannot_be_are_refused_with_those_that_can(width, norm_groups, message):
    with pytest.raises(ValueError, match=message):
        pruned_widths(vae_like("sd15"), width, norm_groups)


def test_whole_groups_stay_and_their_norms_have_the_wide_ones_group_size():
    vae = vae_like("sd15")
    widths = pruned_widths(vae, 0.5)
    channels = choose_channels(vae, widths, "magnitude")
    for name, kept in channels.items():
        if "to_" not in name:
            size = 2 * len(kept) // 4
            assert all(kept[i] + 1 == kept[i + 1] for i in range(len(kept) - 1) if (i + 1) % size), name
    norms = [m for m in pruned_vae(vae, channels, widths).decoder.modules() if isinstance(m, nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {2}


def test_per_group_every_group_keeps_as_many_channels():
    vae = vae_like("sd15")
    widths = pruned_widths(vae, 0.5, "per_group")
    for name, kept in choose_channels(vae, widths, "magnitude", norm_groups="per_group").items():
        if "to_" not in name:  # nothing normalises the inside of the attention
            total = 2 * len(kept)
            assert [sum(c // (total // 4) == part for c in kept) for part in range(4)] == [len(kept) // 4] * 4, name


@pytest.mark.parametrize("choice", ["activation_energy", "taylor", "magnitude"])
def test_channels_that_do_nothing_go_first(choice):
    """Planted: a convolution's weights and bias are zero for half of its channels, in every norm group."""
    vae = vae_like("sd15")
    dead = [c for c in range(32) if c % 8 in (1, 4, 5, 6)]
    conv = vae.decoder.mid_block.resnets[0].conv1
    conv.weight[dead], conv.bias[dead] = 0, 0
    vae.decoder.mid_block.resnets[0].conv2.weight[:, dead] = 0
    norm = vae.decoder.mid_block.resnets[0].norm2
    norm.weight[dead], norm.bias[dead] = 0, 0
    widths, z = pruned_widths(vae, 0.5, "per_group"), torch.randn(4, 4, 6, 6)
    kept = choose_channels(vae, widths, choice, z, norm_groups="per_group")["mid_block.resnets.0.conv1"]
    assert not set(kept) & set(dead)


def test_the_encoder_and_what_is_around_the_decoder_stay_bit_for_bit():
    vae = vae_like("sdxl")
    widths = pruned_widths(vae, 0.5)
    state = pruned_vae(vae, choose_channels(vae, widths, "random"), widths).state_dict()
    others = {key: value for key, value in vae.state_dict().items() if not key.startswith("decoder.")}
    assert all(torch.equal(state[key], value) for key, value in others.items()) and len(others) > 20


def test_half_of_stable_diffusions_decoder_has_a_quarter_of_its_parameters():
    """12,387,459 of 49,490,179, and a 3.94th of its operations."""
    with torch.device("meta"):
        config = VAE_CONFIGS["sd15"]
        teacher = AutoencoderKL(**config)
        pruned = NarrowAutoencoderKL(**config, decoder_block_out_channels=pruned_widths(teacher, 0.5))
    counts = [sum(p.numel() for p in vae.decoder.parameters()) for vae in (teacher, pruned)]
    assert counts == [49_490_179, 12_387_459]
    assert decoder_gflops(teacher, 64) / decoder_gflops(pruned, 64) == pytest.approx(3.94, abs=0.01)


def test_half_of_stable_video_diffusions_decoder_has_a_quarter_of_its_parameters():
    with torch.device("meta"):
        teacher = AutoencoderKLTemporalDecoder(**SVD_VAE)
        widths = pruned_widths(teacher, 0.5)
        pruned = NarrowAutoencoderKLTemporalDecoder(**SVD_VAE, decoder_block_out_channels=widths)
    counts = [sum(p.numel() for p in vae.decoder.parameters()) for vae in (teacher, pruned)]
    assert widths == (64, 128, 256, 256) and counts[0] / counts[1] == pytest.approx(4, abs=0.02)
    assert decoder_gflops(teacher, 16, 2) / decoder_gflops(pruned, 16, 2) == pytest.approx(3.9, abs=0.1)


@pytest.mark.parametrize("name", VAE_CONFIGS)
def test_known_autoencoders_train_a_step_at_half_width(name):
    """The teacher decoder's images are the targets; the gradient reaches every parameter of the pruned one alone."""
    teacher = vae_like(name)
    widths = pruned_widths(teacher, 0.5)
    pruned = pruned_vae(teacher, choose_channels(teacher, widths, "magnitude"), widths).requires_grad_(False)
    student = ImageDecoder(pruned)
    student.decoder.requires_grad_()
    optimizer = torch.optim.SGD(student.decoder.parameters(), lr=1e-3)
    batch, losses = {"latents": torch.randn(2, teacher.config.latent_channels, 8, 8)}, []
    for _ in range(2):
        loss, _ = DecoderDistillation(ImageDecoder(teacher))(student, batch, None)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in student.decoder.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_a_saved_one_is_the_same_one(tmp_path):
    vae = vae_like("flux")
    widths = pruned_widths(vae, 0.5)
    pruned = pruned_vae(vae, choose_channels(vae, widths, "first"), widths)
    pruned.save_pretrained(tmp_path)
    again = NarrowAutoencoderKL.from_pretrained(tmp_path, disable_mmap=True)
    assert again.config.decoder_block_out_channels == list(widths) and again.config.shift_factor == 0.1159
    z, x = torch.randn(1, 16, 8, 8), torch.randn(1, 3, 32, 32)
    assert torch.equal(again.decode(z)[0], pruned.decode(z)[0])
    assert torch.equal(again.encode(x)[0].mean, vae.encode(x)[0].mean)
    copied = NarrowAutoencoderKL.from_config(copy.deepcopy(dict(again.config)))
    assert copied.decoder.conv_in.out_channels == 16


def test_both_decoders_are_one_graph_each():
    teacher = vae_like("sd15")
    widths, z = pruned_widths(teacher, 0.5), torch.randn(2, 4, 8, 8)
    for vae in (teacher, pruned_vae(teacher, choose_channels(teacher, widths, "first"), widths)):
        decoder = ImageDecoder(vae).requires_grad_(False)
        compiled = torch.compile(decoder, fullgraph=True, dynamic=False, backend="eager")
        assert torch.equal(compiled(z), decoder(z))
    torch.compiler.reset()
