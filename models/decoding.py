"""Between images or videos and a pipeline's latents: VAEs of every kind, what latents are scaled by, and the decoding
half of a VAE as one network.

Axes: B batch, C channels, F frames, H and W height and width in latents. What is written BCHW of images is BCFHW of
videos; a VAE of videos takes an image as one frame.
"""

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    DiffusionPipeline,
    ModelMixin,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STATISTICS = ("latents_mean", "latents_std")


def encoded_images(vae: ModelMixin, x_BCHW: Tensor) -> Tensor:
    """What a VAE makes of images or videos from -1 to 1: the mean of its posterior, or, of one without, its only
    answer. A VAE of images encodes the frames of videos one by one."""
    if x_BCHW.ndim == 5 and not takes_frames(vae):
        frames = [encoded_images(vae, x_BCHW[:, :, f]) for f in range(x_BCHW.shape[2])]
        return torch.stack(frames, dim=2)
    is_frame = takes_frames(vae) and x_BCHW.ndim == 4
    output = vae.encode(x_BCHW[:, :, None] if is_frame else x_BCHW)
    latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latent
    check_tiles(vae, x_BCHW, latents)
    return latents[:, :, 0] if is_frame else latents


def decoded_images(vae: ModelMixin, z_BCHW: Tensor, frames_at_once: int | None = None) -> Tensor:
    """The images or videos of what is not scaled any more (`unscaled`). A decoder that sees neighbouring frames and has
    a latent of each takes `frames_at_once` of them, all for None."""
    if isinstance(vae, AutoencoderKLTemporalDecoder):
        # diffusers cuts across the ends of videos (findings/frames_of_two_videos_are_decoded_together.sh).
        chunks = z_BCHW.split(frames_at_once or z_BCHW.shape[2], dim=2)
        return torch.cat([decoded_frames(vae, z_BCfHW) for z_BCfHW in chunks], dim=2)
    is_frame = takes_frames(vae) and z_BCHW.ndim == 4
    images = vae.decode(z_BCHW[:, :, None] if is_frame else z_BCHW, return_dict=False)[0]
    check_tiles(vae, images, z_BCHW)
    return images[:, :, 0] if is_frame else images


def code_in_tiles(pipeline: DiffusionPipeline) -> None:
    """From now on its autoencoder codes what is larger than a tile, whose size is diffusers' own, in tiles that overlap
    and are blended: less memory, and slightly other images. ValueError where there is none, or none that can."""
    vae = getattr(pipeline, "vae", None)
    if not can_tile(vae):
        why = f"its {type(vae).__name__} has no tiles" if vae else "it has no autoencoder"
        raise ValueError(f"model.vae_tiling=true: a {type(pipeline).__name__} cannot be coded so, for {why}")
    vae.enable_tiling()


def can_tile(vae: ModelMixin | None) -> bool:
    return hasattr(vae, "use_tiling")


def is_tiled(vae: ModelMixin | None) -> bool:
    return can_tile(vae) and vae.use_tiling


def check_tiles(vae: ModelMixin, images: Tensor, latents: Tensor) -> None:
    """ValueError where tiles do not fit together: diffusers rounds by how much they overlap to whole pixels and latents
    apart."""
    if not is_tiled(vae):
        return
    shrinks = getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(vae.config.block_out_channels) - 1)
    if images.shape[-2:] != tuple(shrinks * side for side in latents.shape[-2:]):
        height, width = images.shape[-2:]
        raise ValueError(f"model.vae_tiling=true: tiles of this {type(vae).__name__} do not fit together for images of "
                         f"{height}x{width} px: set it to false")  # fmt: skip


def decoded_frames(vae: AutoencoderKLTemporalDecoder, z_BCFHW: Tensor) -> Tensor:
    """The frames of latents that the decoder sees together: it has those of all videos behind one another."""
    count = z_BCFHW.shape[2]
    frames = vae.decode(z_BCFHW.transpose(1, 2).flatten(0, 1), num_frames=count, return_dict=False)[0]
    return frames.unflatten(0, (-1, count)).transpose(1, 2)


def takes_frames(vae: ModelMixin) -> bool:
    """Whether it is a VAE of videos, of which an image is one frame."""
    first = vae.encoder.conv_in
    return isinstance(getattr(first, "conv", first), nn.Conv3d)  # CogVideoX has it in a module that pads the past


def latent_channels(vae: ModelMixin) -> int:
    return vae.config.get("latent_channels") or vae.config["z_dim"]  # of Wan's


def scaling_of(vae: ModelMixin) -> float:
    return vae.config.get("scaling_factor") or 1.0


def has_statistics(pipeline) -> bool:
    """Whether the VAE's `latents_mean` and `latents_std`, or its `shift_factor`, count.

    They do where they are there and the stock pipeline of this class reads them: SDXL's reads the former, Stable
    Diffusion 3's the latter, Stable Diffusion's none. Raises ValueError for values that are no statistics.
    """
    calls = [vars(kind)["__call__"] for kind in type(pipeline).__mro__ if "__call__" in vars(kind)]
    names = {name for call in calls for name in inspect.unwrap(call).__code__.co_names}
    config = pipeline.vae.config
    if "latents_std" in names and all(config.get(name) is not None for name in STATISTICS):
        return len(statistics(config)) == 2
    return "shift_factor" in names and bool(config.get("shift_factor"))


def statistics(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1, C, 1, 1] of a VAE's latents; a `shift_factor` is a mean, beside a deviation of 1.
    ValueError for what is neither."""
    if config.get("latents_mean") is None and config.get("shift_factor"):
        return torch.full((1, 1, 1, 1), float(config["shift_factor"])), torch.ones(1, 1, 1, 1)
    for name in STATISTICS:
        values, count = config[name], config.get("latent_channels") or config["z_dim"]
        is_list = isinstance(values, (list, tuple)) and all(type(value) in (int, float) for value in values)
        if not is_list or len(values) != count or not all(map(math.isfinite, values)):
            raise ValueError(f"the VAE's {name}={values} must be {count} numbers, one per latent channel")
    if not all(std > 0 for std in config["latents_std"]):
        raise ValueError(f"the VAE's latents_std={config['latents_std']} must be above 0")
    mean, std = (torch.tensor(config[name], dtype=torch.float32).view(1, -1, 1, 1) for name in STATISTICS)
    return mean, std


def unscaled(z_BCHW: Tensor, scaling: float, mean_std: tuple[Tensor, Tensor] | None) -> Tensor:
    """What a VAE decodes, from a pipeline's latents: z / scaling, or z · std / scaling + mean."""
    if mean_std is None:
        return z_BCHW / scaling
    mean, std = (of_channels(x, z_BCHW) for x in mean_std)
    return z_BCHW * std / scaling + mean


def scaled(x_BCHW: Tensor, scaling: float, mean_std: tuple[Tensor, Tensor] | None) -> Tensor:
    """A pipeline's latents, from what a VAE encodes: the inverse of `unscaled`."""
    if mean_std is None:
        return x_BCHW * scaling
    mean, std = (of_channels(x, x_BCHW) for x in mean_std)
    return (x_BCHW - mean) * scaling / std


def of_channels(x_1C11: Tensor, like: Tensor) -> Tensor:
    """Statistics of channels, shaped so that they meet the axes of `like`."""
    return x_1C11.view(1, -1, *[1] * (like.ndim - 2))


class ImageDecoder(nn.Module):
    """Everything between sampled latents and the image in [−1, 1]; its modules are the VAE's own, not copies.

    normalised: whether the VAE's statistics count, `has_statistics` of the pipeline.
    """

    def __init__(self, vae: AutoencoderKL, normalised: bool = False):
        super().__init__()
        self.post_quant_conv, self.decoder = getattr(vae, "post_quant_conv", None), vae.decoder
        self.scaling = scaling_of(vae)
        mean, std = statistics(vae.config) if normalised else (None, None)
        place = next(vae.decoder.parameters()).device
        self.register_buffer("latents_mean", mean if mean is None else mean.to(place), persistent=False)
        self.register_buffer("latents_std", std if std is None else std.to(place), persistent=False)

    def inputs(self, latents_BCHW: Tensor) -> Tensor:
        """What the decoder itself sees of them, in its dtype."""
        mean_std = None if self.latents_std is None else (self.latents_mean, self.latents_std)
        z_BCHW = unscaled(latents_BCHW, self.scaling, mean_std).to(next(self.decoder.parameters()).dtype)
        return self.post_quant_conv(z_BCHW) if self.post_quant_conv is not None else z_BCHW

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        return self.decoder(self.inputs(latents_BCHW))

    def enable_gradient_checkpointing(self) -> None:
        self.decoder.gradient_checkpointing = True
        self.decoder._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def disable_gradient_checkpointing(self) -> None:
        self.decoder.gradient_checkpointing = False


class VideoDecoder(ImageDecoder):
    """The same of an AutoencoderKLTemporalDecoder: from latents [B, C, F, H, W] to videos [B, 3, F, H, W], whose frames
    the decoder sees all together."""

    def forward(self, latents_BCFHW: Tensor) -> Tensor:
        z_BCFHW = self.inputs(latents_BCFHW)
        videos, _, frames = z_BCFHW.shape[:3]
        none_BF = z_BCFHW.new_zeros(videos, frames)  # which are images alone, without neighbours
        z_bCHW = z_BCFHW.transpose(1, 2).flatten(0, 1)
        frames_b3HW = self.decoder(z_bCHW, num_frames=frames, image_only_indicator=none_BF)
        return frames_b3HW.unflatten(0, (videos, frames)).transpose(1, 2)


class CausalDecoder(VideoDecoder):
    """The same of an AutoencoderKLCogVideoX, in diffusers' chunks of latents: norms see one chunk, and convolutions the
    last frames of the chunk before it."""

    def __init__(self, vae: AutoencoderKLCogVideoX, normalised: bool = False):
        super().__init__(vae, normalised)
        self.latents_at_once = vae.num_latent_frames_batch_size

    def forward(self, latents_BCFHW: Tensor) -> Tensor:
        z_BCFHW, cache, videos = self.inputs(latents_BCFHW), None, []
        first = z_BCFHW.shape[2] % self.latents_at_once + self.latents_at_once  # takes those that are left over
        begin_BCfHW, rest_BCfHW = z_BCFHW[:, :, :first], z_BCFHW[:, :, first:]
        for z_BCfHW in (begin_BCfHW, *rest_BCfHW.split(self.latents_at_once, dim=2)):
            if z_BCfHW.shape[2]:
                frames_B3fHW, cache = self.decoder(z_BCfHW, conv_cache=cache)
                videos.append(frames_B3fHW)
        return torch.cat(videos, dim=2)


class WanDecoder(VideoDecoder):
    """The same of an AutoencoderKLWan: latent by latent with the past of every convolution, as diffusers has it, and
    for a gradient, which needs all of them anyway, at once, to the same frames but for rounding. With a `patch_size`
    the channels that it ends with are the pixels of a patch."""

    def __init__(self, vae: AutoencoderKLWan, normalised: bool = False):
        super().__init__(vae, normalised)
        self.patch_size = vae.config.patch_size or 1

    def forward(self, latents_BCFHW: Tensor) -> Tensor:
        return unpatchify(self.before_patches(self.inputs(latents_BCFHW)), self.patch_size)

    def before_patches(self, z_BCFHW: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return decoded_at_once(self.decoder, z_BCFHW)
        past = [None] * sum(isinstance(layer, WanCausalConv3d) for layer in self.decoder.modules())
        latents = z_BCFHW.split(1, dim=2)
        videos = [self.decoder(z_BC1HW, feat_cache=past, feat_idx=[0], first_chunk=z_BC1HW is latents[0])
                  for z_BC1HW in latents]  # fmt: skip
        return torch.cat(videos, dim=2)


def decoded_at_once(decoder: nn.Module, z_BCFHW: Tensor) -> Tensor:
    """What a WanDecoder3d makes of all latents of a video, before it is clamped."""
    saves = torch.is_grad_enabled() and decoder.gradient_checkpointing
    run = partial(checkpoint, use_reentrant=False) if saves else lambda layer, x: layer(x)
    x = run(decoder.mid_block, decoder.conv_in(z_BCFHW))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = run(resnet, x)
        for upsampler in block.upsamplers or ():
            x = run(upsampler if upsampler.mode == "upsample2d" else partial(upsampled_in_time, upsampler), x)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))


def upsampled_in_time(upsampler: nn.Module, x_BCFHW: Tensor) -> Tensor:
    """Each frame but the first becomes two, by a convolution that sees no first one; then all are enlarged."""
    first, rest = x_BCFHW[:, :, :1], x_BCFHW[:, :, 1:]
    if rest.shape[2]:
        both = upsampler.time_conv(rest).unflatten(1, (2, -1))
        x_BCFHW = torch.cat([first, both.movedim(1, 3).flatten(2, 3)], dim=2)
    return upsampler(x_BCFHW)


def is_causal(vae: ModelMixin) -> bool:
    """Whether its decoder sees the frames before, so that a video is decoded from its first frame on."""
    return isinstance(vae, AutoencoderKLCogVideoX | AutoencoderKLWan)


DECODERS: dict[type[ModelMixin], type[ImageDecoder]] = {
    AutoencoderKLTemporalDecoder: VideoDecoder, AutoencoderKLCogVideoX: CausalDecoder, AutoencoderKLWan: WanDecoder
}  # fmt: skip


def decoder_of(vae: ModelMixin, normalised: bool = False) -> ImageDecoder:
    """The decoding half of an autoencoder as one network; `normalised` is ImageDecoder's."""
    kinds = (decoder for kind, decoder in DECODERS.items() if isinstance(vae, kind))
    return next(kinds, ImageDecoder)(vae, normalised)
