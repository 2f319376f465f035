"""The size that a pipeline draws by itself, however its configurations say it: elsewhere one number, of squares."""

import logging

import diffusers
from diffusers import DiffusionPipeline, ModelMixin

from slimstep.models.networks import network_of, part_of

log = logging.getLogger("slimstep")


def latent_side(network: ModelMixin, way: str) -> int:
    """The side of the square of latents that a network makes by itself. ValueError, with a way out, where it has
    none."""
    if isinstance(size := network.config.get("sample_size"), int):
        return size
    reason = "has no sample_size" if size is None else f"has sample_size={list(size)}, and only squares can be drawn"
    part = "unet" if hasattr(network, "down_blocks") else "transformer"
    raise ValueError(f"{part}/config.json {reason}: {way} says which size to take")


def settle_sizes(pipeline: DiffusionPipeline) -> None:
    """Makes one number of sizes that UNet and VAE have as [height, width] of a square, and gives a UNet without any its
    VAE's, with a line of the log.

    Raises ValueError, which names the file, for what is no size. Sizes of rectangles stay: `native_pixels` tells.
    """
    own = part_of(pipeline)
    for part in (own, "vae"):
        network = getattr(pipeline, part)
        size = network.config.get("sample_size")
        sides = size if isinstance(size, (list, tuple)) else [size] * 2
        if size is not None and (len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides)):
            raise ValueError(f"{part}/config.json has sample_size={size}, which must be a number or [height, width]")
        if size is not None and sides[0] == sides[1]:
            network.register_to_config(sample_size=sides[0])
    network, pixels = network_of(pipeline), pipeline.vae.config.get("sample_size")
    if network.config.get("sample_size") is None and isinstance(pixels, int):
        network.register_to_config(sample_size=pixels // pipeline.vae_scale_factor)
        log.info(f"{own}/config.json has no sample_size: the model draws {pixels} px, as its VAE's tells")
    elif own == "transformer" and network.config.get("sample_size") is None:  # then the pipeline knows one
        network.register_to_config(sample_size=getattr(pipeline, "default_sample_size", None))
    remember_size(pipeline)


def scale_factor(pipeline: DiffusionPipeline) -> int:
    """Pixels of an image along one of what is denoised: 8 of most autoencoders, 1 where there is none."""
    return getattr(pipeline, "vae_scale_factor", 1)


def native_pixels(pipeline: DiffusionPipeline) -> int:
    """The side of the images that a pipeline draws by itself. ValueError where these are no squares."""
    return latent_side(network_of(pipeline), "data.resolution=PIXELS") * scale_factor(pipeline)


def set_resolution(pipeline: DiffusionPipeline, pixels: int) -> None:
    """Makes squares of so many pixels what the pipeline draws by itself, also where its model was made for others."""
    # Without the version a pipeline around weights of before diffusers 0.9 would take their size for a mistake.
    size, version = pixels // scale_factor(pipeline), diffusers.__version__
    network_of(pipeline).register_to_config(sample_size=size, _diffusers_version=version)
    remember_size(pipeline)


def remember_size(pipeline: DiffusionPipeline) -> None:
    """Tells a pipeline the size in its network's config, as far as its class took it down when it was made."""
    size = network_of(pipeline).config.get("sample_size")
    for name, value in {"default_sample_size": size, "_is_unet_config_sample_size_int": isinstance(size, int)}.items():
        if hasattr(pipeline, name):
            setattr(pipeline, name, value)
