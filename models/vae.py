"""Pruned autoencoders: classes of diffusers whose decoder has its own widths; the encoder keeps its own.

This one file travels with exports, so it holds all that a class needs and imports nothing but torch and diffusers.
"""

import hashlib
import inspect
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLTemporalDecoder,
    ModelMixin,  # diffusers looks for it here
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXDecoder3D
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.autoencoders.vae import Decoder
from torch import nn

# The name under which this file travels: diffusers keys imported files by their names alone.
FILE = f"slimstep_vae_{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:10]}"


class NarrowDecoder:
    """Mixed into an autoencoder of diffusers, STOCK, before it: its decoder has widths of its own,
    `decoder_block_out_channels`, in the order of `block_out_channels`.

    decoder_norm_groups: 'whole' normalises as many channels together as the stock decoder does, in fewer groups;
        'per_group' ('thinned' in earlier exports) has as many groups of fewer channels.
    auto_map: written by save_config, so that diffusers' AutoModel finds this file beside the weights.
    All other arguments are the stock class's. Module paths are the stock ones. Where the stock decoder has a 1×1
    shortcut between two levels the pruned one has it, too, also if its own widths happen to agree there.

    decoder_widths: the decoder's channels per level. is_pruned: whether they are not the encoder's.
    """

    STOCK: type[ModelMixin]

    @register_to_config
    def __init__(
        self,
        decoder_block_out_channels: Sequence[int] | None = None,
        decoder_norm_groups: str = "whole",
        auto_map: Mapping[str, str] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.__module__ = FILE  # a pipeline writes it into model_index.json, and finds the class by it
        stock_widths = tuple(self.config.block_out_channels)
        widths = tuple(decoder_block_out_channels or stock_widths)
        self.decoder_widths, self.is_pruned = widths, widths != stock_widths
        if self.is_pruned:
            stock, is_whole = self.decoder, decoder_norm_groups == "whole"
            self.decoder = self.decoder_of(widths, is_whole)
            keep_shortcuts(self.decoder, stock_widths, widths)
            if is_whole:
                keep_group_sizes(self.decoder, stock)
        self.register_to_config(decoder_block_out_channels=list(widths))

    def decoder_of(self, widths: Sequence[int], is_whole: bool) -> nn.Module:
        """A decoder of these widths; where norm groups are whole, of any number of them."""
        raise NotImplementedError

    def save_config(self, save_directory: str | Path, *args, **kwargs) -> None:
        """As in diffusers; this file goes along, so that whoever saves the network has its class in the folder, too."""
        self.register_to_config(auto_map={"AutoModel": f"{FILE}.{type(self).__name__}"})
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory) / f"{FILE}.py")
        super().save_config(save_directory, *args, **kwargs)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """diffusers reads a config's fields off the signature, where **kwargs hides the stock ones."""
        keys = set(inspect.signature(input_class.__init__).parameters)
        if "decoder_block_out_channels" not in keys:
            return keys
        return keys | set(inspect.signature(input_class.STOCK.__init__).parameters)


class NarrowAutoencoderKL(NarrowDecoder, AutoencoderKL):
    STOCK = AutoencoderKL

    def decoder_of(self, widths: Sequence[int], is_whole: bool) -> Decoder:
        return Decoder(
            in_channels=self.config.latent_channels,
            out_channels=self.config.out_channels,
            up_block_types=self.config.up_block_types,
            block_out_channels=widths,
            layers_per_block=self.config.layers_per_block,
            norm_num_groups=1 if is_whole else self.config.norm_num_groups,
            act_fn=self.config.act_fn,
            mid_block_add_attention=self.config.mid_block_add_attention,
        )


class NarrowAutoencoderKLTemporalDecoder(NarrowDecoder, AutoencoderKLTemporalDecoder):
    """Stable Video Diffusion's. diffusers normalises every width of it in 32 groups: widths are multiples of that."""

    STOCK = AutoencoderKLTemporalDecoder

    def decoder_of(self, widths: Sequence[int], is_whole: bool) -> TemporalDecoder:
        return TemporalDecoder(
            in_channels=self.config.latent_channels,
            out_channels=self.config.out_channels,
            block_out_channels=widths,
            layers_per_block=self.config.layers_per_block,
        )


class NarrowAutoencoderKLCogVideoX(NarrowDecoder, AutoencoderKLCogVideoX):
    """CogVideoX's. Levels that differ in the stock decoder differ in it, too, or diffusers' blocks have no shortcut."""

    STOCK = AutoencoderKLCogVideoX

    def decoder_of(self, widths: Sequence[int], is_whole: bool) -> CogVideoXDecoder3D:
        return CogVideoXDecoder3D(
            in_channels=self.config.latent_channels,
            out_channels=self.config.out_channels,
            up_block_types=self.config.up_block_types,
            block_out_channels=widths,
            layers_per_block=self.config.layers_per_block,
            act_fn=self.config.act_fn,
            norm_eps=self.config.norm_eps,
            norm_num_groups=1 if is_whole else self.config.norm_num_groups,
            temporal_compression_ratio=self.config.temporal_compression_ratio,
        )


KINDS = NarrowAutoencoderKL, NarrowAutoencoderKLTemporalDecoder, NarrowAutoencoderKLCogVideoX
NARROW = {kind.__name__: kind for kind in KINDS}


def keep_shortcuts(decoder: nn.Module, stock_widths: Sequence[int], widths: Sequence[int]) -> None:
    """Where two levels of the stock decoder differ and those of the pruned one do not: the shortcut between them."""
    if isinstance(decoder, CogVideoXDecoder3D):
        return
    for i, block in enumerate(decoder.up_blocks[1:], start=1):
        level = len(stock_widths) - 1 - i
        first = block.resnets[0]
        first = getattr(first, "spatial_res_block", first)  # the temporal ones have as many channels as they are given
        if stock_widths[level] != stock_widths[level + 1] and first.conv_shortcut is None:
            first.use_in_shortcut, first.conv_shortcut = True, nn.Conv2d(widths[level + 1], widths[level], 1)


def keep_group_sizes(decoder: nn.Module, stock: nn.Module) -> None:
    """Every GroupNorm with as many channels in a group as the stock decoder's has."""
    for name, norm in decoder.named_modules():
        if isinstance(norm, nn.GroupNorm):
            original = stock.get_submodule(name)
            norm.num_groups = norm.num_channels * original.num_groups // original.num_channels
