"""Structured pruning of a VAE decoder (SnapFusion, section 3.2): which channels stay, and the pruned decoder of them.

torch-pruning finds the channels that go together: those of a residual stream with everything that writes into it or
reads from it, those between the two convolutions of a ResNet, those inside the attention. Each such group is named by
one of its convolutions. What a GroupNorm normalises together stays together ('whole': whole groups stay or go, and the
statistics of those that stay do not change), or channels go per group ('per_group': every one of its groups keeps the
same share of its channels). In a decoder of videos convolutions over time belong to the same residual streams, and in
CogVideoX's what scales and shifts a norm by the latents. Wan's norms divide by the length of all channels that stay.

Axes: B batch, C channels of a group, F frames, H and W latent size. What is written BCHW of latents is BCFHW of videos.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    ModelMixin,
)
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from torch import Tensor, nn

from slimstep.models.decoding import decoded_at_once, decoder_of, latent_channels
from slimstep.models.pipeline import quiet
from slimstep.models.vae import NarrowAutoencoderKL, NarrowAutoencoderKLCogVideoX, NarrowAutoencoderKLTemporalDecoder
from slimstep.prune.config import BY_ACTIVATIONS, IMPORTANCE
from slimstep.prune.wan_decoder import SplitAttention, gains, merged, split

Channels = dict[str, list[int]]
# {diffusers' class: the class of its pruned ones}
PRUNABLE: dict[type[ModelMixin], type[ModelMixin]] = {
    AutoencoderKL: NarrowAutoencoderKL,
    AutoencoderKLTemporalDecoder: NarrowAutoencoderKLTemporalDecoder,
    AutoencoderKLCogVideoX: NarrowAutoencoderKLCogVideoX,
    AutoencoderKLWan: AutoencoderKLWan,  # which has a width of its decoder's own
}
TEMPORAL_GROUPS = 32  # of every norm of a temporal decoder: diffusers has the number in its code, not in a config.json
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def stock_widths(vae: ModelMixin) -> tuple[int, ...]:
    """The decoder's channels per level, in the order of `block_out_channels`."""
    config = vae.config
    if isinstance(vae, AutoencoderKLWan):
        return tuple((config.decoder_base_dim or config.base_dim) * factor for factor in config.dim_mult)
    return tuple(config.block_out_channels)


def pruned_widths(vae: ModelMixin, width: float | Sequence[float], norm_groups: str = "whole") -> tuple[int, ...]:
    """The decoder's channels per level, in the order of `block_out_channels`, for the share `width` that stays of each.

    Raises ValueError for shares that the norm groups do not take, and where levels that are one residual stream get
    different widths.
    """
    stock, groups = stock_widths(vae), vae.config.get("norm_num_groups") or TEMPORAL_GROUPS
    is_temporal = isinstance(vae, AutoencoderKLTemporalDecoder)
    if is_temporal and vae.config.layers_per_block < 2:
        why = "diffusers never runs the attention of such a decoder, so that nothing says which of its channels go"
        raise ValueError(f"vae/config.json has layers_per_block={vae.config.layers_per_block}: {why}")
    shares = list(width) if isinstance(width, Sequence) else [width] * len(stock)
    if len(shares) != len(stock):
        raise ValueError(
            f"decoder.width={shares} has {len(shares)} values; this decoder has {len(stock)} levels: {stock}"
        )
    if isinstance(vae, AutoencoderKLWan):
        return widths_of_wan(vae, shares)
    for level, (share, channels) in enumerate(zip(shares, stock, strict=True)):
        # diffusers' code makes a temporal decoder of no other widths than multiples of its groups.
        parts = groups if norm_groups == "whole" and not is_temporal else channels // groups
        if not any(math.isclose(share, count / parts, abs_tol=1e-4) for count in range(1, parts + 1)):
            possible = ", ".join(f"{count / parts:.4g}" for count in range(1, parts + 1))
            rule = "whole groups stay or go" if norm_groups == "whole" else "every group keeps the same share"
            rule = f"diffusers makes it of multiples of {groups} channels alone" if is_temporal else rule
            raise ValueError(
                f"decoder.width={share} is impossible at level {level}: its {channels} channels are normalised in "
                f"{groups} groups, and {rule}: {possible}"
            )
    pruned = tuple(round(share * channels) for share, channels in zip(shares, stock, strict=True))
    for level in range(len(stock) - 1):
        if stock[level] == stock[level + 1] and pruned[level] != pruned[level + 1]:
            raise ValueError(
                f"decoder.width={shares}: levels {level} and {level + 1} are one residual stream of {stock[level]} "
                "channels and keep the same share"
            )
        joins = stock[level] != stock[level + 1] and pruned[level] == pruned[level + 1]
        if joins and isinstance(vae, AutoencoderKLCogVideoX):
            raise ValueError(
                f"decoder.width={shares}: levels {level} and {level + 1} would both have {pruned[level]} channels, and "
                "diffusers' decoder has a shortcut between them only where they differ"
            )
    return pruned


def widths_of_wan(vae: AutoencoderKLWan, shares: Sequence[float]) -> tuple[int, ...]:
    """diffusers makes the decoder of one number, its `decoder_base_dim`. ValueError for what that cannot say."""
    config = vae.config
    if config.is_residual:
        raise ValueError("vae/config.json has is_residual, as of Wan 2.2: its decoder is of another kind, and is not "
                         "pruned")  # fmt: skip
    base, share = config.decoder_base_dim or config.base_dim, shares[0]
    if len({*shares}) > 1:
        raise ValueError(f"decoder.width={list(shares)}: Wan's decoder has one number for all levels: give one share")
    possible = [n for n in range(1, base + 1) if all(n * factor % 2 == 0 for factor in config.dim_mult[1:])]
    if (width := next((n for n in possible if math.isclose(share, n / base, abs_tol=1e-4)), None)) is None:
        shown = ", ".join(f"{n / base:.4g}" for n in possible)
        raise ValueError(f"decoder.width={share} is impossible: {base} channels become a whole number, of which levels "
                         f"are halved: {shown}")  # fmt: skip
    return tuple(width * factor for factor in config.dim_mult)


def choose_channels(
    vae: ModelMixin,
    widths: Sequence[int],
    importance: str,
    latents_BCHW: Tensor | None = None,
    seed: int = 0,
    norm_groups: str = "whole",
    normalised: bool = False,
) -> Channels:
    """{group: the channels that stay, ascending} for a decoder of these widths.

    importance: 'magnitude' (torch-pruning's group L2 norm of all weights that go with a channel), 'taylor' (how much
    the image changes to first order without the channel, by gradients of random projections of it),
    'activation_energy' (the mean square of what is written to the channel), 'random', or 'first'. 'taylor' and
    'activation_energy' look at `latents_BCHW`, as the pipeline samples them; `normalised` is ImageDecoder's.
    """
    decoder, graph = traced(vae)
    groups = {name_of(decoder, group): group for group in all_groups(graph, decoder)}
    if importance in BY_ACTIVATIONS:
        values = activation_values(vae, decoder, groups, importance, latents_BCHW, seed, normalised)
    elif importance == "magnitude":
        score = tp.importance.GroupMagnitudeImportance(p=2)
        values = {name: score(group) for name, group in groups.items()}
    elif importance == "random":
        draw = torch.Generator().manual_seed(seed)
        values = {name: torch.rand(len(group[0].idxs), generator=draw) for name, group in groups.items()}
    else:
        assert importance == "first", f"importance is {importance!r}, none of {IMPORTANCE}"
        values = {name: -torch.arange(float(len(group[0].idxs))) for name, group in groups.items()}
    rule, stock = best_groups if norm_groups == "whole" else best, stock_widths(vae)

    def stay(name: str) -> int:
        """How many do; some of Wan's streams are half as wide as their level."""
        level = level_of(name, len(widths))
        return len(values[name]) * widths[level] // stock[level]

    return {name: rule(values[name], stay(name), num_parts(group)) for name, group in groups.items()}


def best(values_C: Tensor, keep: int, parts: int) -> list[int]:
    """The `keep` highest values' places, equally many in each of `parts` neighbouring ranges of the same size."""
    size = len(values_C) // parts
    ranked = values_C.reshape(parts, size).argsort(dim=1, descending=True, stable=True)[:, : keep // parts]
    return sorted((ranked + size * torch.arange(parts)[:, None]).flatten().tolist())


def best_groups(values_C: Tensor, keep: int, parts: int) -> list[int]:
    """The places in the `parts` neighbouring ranges that have the highest sums, `keep` places in all."""
    if parts == 1:  # nothing normalises them
        return best(values_C, keep, 1)
    size = len(values_C) // parts
    ranges = values_C.reshape(parts, size).sum(1).argsort(descending=True, stable=True)[: keep // size]
    return sorted((size * ranges[:, None] + torch.arange(size)).flatten().tolist())


def pruned_vae(
    vae: ModelMixin, channels: Channels, widths: Sequence[int], norm_groups: str = "whole"
) -> ModelMixin:
    """The VAE with these channels of its decoder; everything else is a copy, bit for bit.

    Attention logits become sums over fewer channels with a larger 1/√width: queries are scaled so that the pruned
    decoder is the teacher decoder with the other channels masked.
    """
    decoder, graph = traced(vae)
    modules = dict(decoder.named_modules())
    for name, kept in channels.items():
        root = modules[name]
        if gone := sorted(set(range(out_channels(root))) - set(kept)):
            graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, gone).prune()
    with torch.no_grad():
        for attention in mid_attentions(decoder):
            whole = attention.width if isinstance(attention, SplitAttention) else attention.inner_dim
            for parameter in attention.to_q.parameters():
                parameter *= math.sqrt(out_channels(attention.to_q) / whole)
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    own = {"decoder_block_out_channels": list(widths), "decoder_norm_groups": norm_groups}
    if isinstance(vae, AutoencoderKLWan):
        own = {"decoder_base_dim": widths[0] // config["dim_mult"][0]}
    pruned = PRUNABLE[type(vae)].from_config({**config, **own})
    others = {key: value for key, value in vae.state_dict().items() if not key.startswith("decoder.")}
    weights = merged(decoder.state_dict()) if isinstance(vae, AutoencoderKLWan) else decoder.state_dict()
    decoders = {f"decoder.{key}": value for key, value in weights.items()}
    pruned.load_state_dict({**others, **decoders}, strict=True)
    with quiet():  # diffusers warns of every cast
        return pruned.to(device=vae.device, dtype=vae.dtype).eval()


# ---- torch-pruning's view of the decoder ----


def traced(vae: ModelMixin) -> tuple[nn.Module, tp.DependencyGraph]:
    """A float32 copy of the decoder on the CPU and its dependency graph, in which attention is plain arithmetic."""
    decoder = copy.deepcopy(vae.decoder).to("cpu", torch.float32).requires_grad_().eval()
    sides, channels = (8, 8), latent_channels(vae)
    example: Any = {"sample": torch.randn(1, channels, *sides)}
    options: dict[str, Any] = {"verbose": False}  # it would warn of what blends space and time, single numbers
    if isinstance(vae, AutoencoderKLTemporalDecoder):
        example |= {"num_frames": 1, "image_only_indicator": torch.zeros(1, 1)}
    elif isinstance(vae, AutoencoderKLCogVideoX):
        example, options["output_transform"] = {"sample": torch.randn(1, channels, 1, *sides)}, lambda output: output[0]
    elif isinstance(vae, AutoencoderKLWan):
        example, options["forward_fn"] = torch.randn(1, channels, 2, *sides), decoded_at_once
        options["unwrapped_parameters"] = gains(split(decoder))
    with torch.enable_grad(), processor(decoder, AttnProcessor()), padding_by_copies(decoder):
        graph = tp.DependencyGraph().build_dependency(decoder, example, **options)
    return decoder, graph


@contextmanager
def padding_by_copies(decoder: nn.Module) -> Iterator[None]:
    """CogVideoX's causal convolutions with another kind of padding while the block runs: what they put frames behind
    each other by, torch-pruning would take for channels behind each other."""
    layers = [layer for layer in decoder.modules() if isinstance(layer, CogVideoXCausalConv3d)]
    own = [(layer.pad_mode, layer.conv.padding) for layer in layers]
    for layer in layers:
        layer.pad_mode, layer.conv.padding = "replicate", (0, 0, 0)
    try:
        yield
    finally:
        for layer, (mode, padding) in zip(layers, own, strict=True):
            layer.pad_mode, layer.conv.padding = mode, padding


def all_groups(graph: tp.DependencyGraph, decoder: nn.Module) -> Iterator[tp.Group]:
    """Every set of channels that go together, but the image's own."""
    own = [layer for name in ("conv_out", "time_conv_out") if (layer := getattr(decoder, name, None)) is not None]
    own = [getattr(layer, "conv", layer) for layer in own]  # which CogVideoX has in a module that pads the past
    yield from graph.get_all_groups(ignored_layers=own, root_module_types=[*CONVOLUTIONS, nn.Linear])


def name_of(decoder: nn.Module, group: tp.Group) -> str:
    names = {module: name for name, module in decoder.named_modules()}
    return names[group[0].dep.target.module]


def level_of(name: str, levels: int) -> int:
    """The level of a module, counted from the image as in `block_out_channels`; the middle has the innermost."""
    if name.startswith("norm_out."):
        return 0
    return levels - 1 - (int(name.split(".")[1]) if name.startswith("up_blocks.") else 0)


def writers(group: tp.Group) -> list[nn.Module]:
    """The convolutions and linear layers that write a group's channels."""
    layers = [item.dep.target.module for item in group if item.dep.handler in OUT_CHANNELS]
    return list(dict.fromkeys(layer for layer in layers if isinstance(layer, (*CONVOLUTIONS, nn.Linear))))


OUT_CHANNELS = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)


def num_parts(group: tp.Group) -> int:
    """How many ranges must stay equally large: the groups of the GroupNorms that see these channels."""
    norms = [item.dep.target.module for item in group if isinstance(item.dep.target.module, nn.GroupNorm)]
    return norms[0].num_groups if norms else 1


def out_channels(layer: nn.Module) -> int:
    return layer.out_channels if isinstance(layer, CONVOLUTIONS) else layer.out_features


def mid_attentions(decoder: nn.Module) -> list[nn.Module]:
    return [attention for attention in getattr(decoder.mid_block, "attentions", ()) if attention is not None]


@contextmanager
def processor(decoder: nn.Module, kind) -> Iterator[None]:
    """The attention computed in another way while the block runs."""
    attentions = [attention for attention in mid_attentions(decoder) if isinstance(attention, Attention)]
    for attention in attentions:
        attention.set_processor(kind)
    try:
        yield
    finally:
        for attention in attentions:
            attention.set_processor(AttnProcessor2_0())


# ---- values from activations ----


def activation_values(
    vae: ModelMixin,
    decoder: nn.Module,
    groups: Mapping[str, tp.Group],
    importance: str,
    latents_BCHW: Tensor,
    seed: int,
    normalised: bool,
) -> dict[str, Tensor]:
    """'activation_energy' or 'taylor' of every channel, summed over latents.

    Removing channel c from everything that writes it changes the image by J_c to first order; v·J_c, for a random v of
    unit variance, is the sum of activation times gradient of v·image, and its mean square over v is ‖J_c‖².
    """
    values = {name: torch.zeros(len(group[0].idxs)) for name, group in groups.items()}
    layers = {layer: name for name, group in groups.items() for layer in writers(group)}
    seen: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, inputs, output: Tensor) -> None:
        if importance == "taylor":
            output.retain_grad()
        seen[layer] = output

    handles = [layer.register_forward_hook(keep) for layer in layers]
    draw, whole = torch.Generator().manual_seed(seed), decoder_of(vae, normalised)
    whole.decoder = decoder.to(vae.device)
    # Wan's as torch-pruning follows it is run at once, as for a gradient.
    with torch.set_grad_enabled(importance == "taylor" or isinstance(vae, AutoencoderKLWan)):
        for z_CHW in latents_BCHW:
            image = whole(z_CHW[None].to(vae.device))
            if importance == "taylor":
                image.backward(torch.randn(image.shape, generator=draw).to(image.device))
            change = {name: torch.zeros_like(value) for name, value in values.items()}
            for layer, name in layers.items():
                a = channels_first(layer, seen[layer].detach())
                if importance == "activation_energy":
                    values[name] += a.square().mean(1).cpu()
                else:
                    change[name] += (a * channels_first(layer, seen[layer].grad)).sum(1).cpu()
            for name in values:
                values[name] += change[name].square()
            seen.clear()
    for handle in handles:
        handle.remove()
    return values


def channels_first(layer: nn.Module, x: Tensor) -> Tensor:
    """[C, everything else] of what one sample, or each of its frames, makes a layer write."""
    return x.movedim(1 if isinstance(layer, CONVOLUTIONS) else -1, 0).flatten(1)
