"""The size that a pipeline draws by itself, however its configurations say it: elsewhere it is a resolution, a number
or "HEIGHTxWIDTH" (engine/resolution.py).

Of videos it is the number of frames, too: `sample_frames`, or `num_frames`, in the network's configuration.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers import AutoencoderKLCogVideoX, DiffusionPipeline, ModelMixin

from slimstep.engine.resolution import Resolution, resolution_of, sides
from slimstep.models.first_frames import video_options
from slimstep.models.networks import network_of, part_of

log = logging.getLogger("slimstep")


def latent_size(network: ModelMixin, way: str) -> Resolution:
    """Height and width of the latents that a network makes by itself. ValueError, with a way out, where it has none."""
    if network.config.get("sample_size") is None:
        part = "unet" if hasattr(network, "down_blocks") else "transformer"
        raise ValueError(f"{part}/config.json has no sample_size: {way} says which size to take")
    return resolution_of(*sides_of(network.config))


def sides_of(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Height and width of what a network of this configuration denoises; None where it does not say them."""
    size = config.get("sample_size")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


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
        network.register_to_config(sample_size=pixels // scale_factor(pipeline))
        log.info(f"{own}/config.json has no sample_size: the model draws {pixels} px, as its VAE's tells")
    elif own == "transformer" and network.config.get("sample_size") is None:  # then the pipeline knows one
        network.register_to_config(sample_size=getattr(pipeline, "default_sample_size", None))
    remember_size(pipeline)


def scale_factor(pipeline: DiffusionPipeline) -> int:
    """Pixels of an image along one of what is denoised: 8 of most autoencoders, 1 where there is none."""
    names = ("vae_scale_factor", "vae_scale_factor_spatial")  # the latter of pipelines of videos
    return next((getattr(pipeline, name) for name in names if hasattr(pipeline, name)), 1)


def native_pixels(pipeline: DiffusionPipeline) -> Resolution:
    """The size of the images that a pipeline draws by itself. ValueError where it has none."""
    height, width = sides(latent_size(network_of(pipeline), "data.resolution=PIXELS"))
    return resolution_of(height * scale_factor(pipeline), width * scale_factor(pipeline))


def set_resolution(pipeline: DiffusionPipeline, pixels: Resolution, frames: int | None = None) -> None:
    """Makes images of so many pixels what the pipeline draws by itself, also where its model was made for others; of
    videos, so many frames of them, None as many as it draws."""
    network = network_of(pipeline)
    if has_own_positions(network) and pixels != (native := native_pixels(pipeline)):
        raise ValueError(f"data.resolution={pixels}: this {kind_of(network)} learnt the positions of {native} alone: "
                         "set that, or null")  # fmt: skip
    # Without the version a pipeline around weights of before diffusers 0.9 would take their size for a mistake.
    height, width = (side // scale_factor(pipeline) for side in sides(pixels))
    size, version = height if height == width else [height, width], diffusers.__version__
    network.register_to_config(sample_size=size, _diffusers_version=version)
    remember_size(pipeline)
    if frames is not None:
        set_frames(pipeline, frames)


@contextmanager
def drawing(pipeline: DiffusionPipeline, height: int, width: int) -> Iterator[None]:
    """While this runs, images of this height and width in pixels are what the pipeline draws by itself."""
    network, factor = network_of(pipeline), scale_factor(pipeline)
    own = network.config.sample_size
    network.register_to_config(sample_size=[height // factor, width // factor])
    remember_size(pipeline)
    try:
        yield
    finally:
        network.register_to_config(sample_size=own)
        remember_size(pipeline)


def remember_size(pipeline: DiffusionPipeline) -> None:
    """Tells a pipeline the size in its network's config, as far as its class took it down when it was made."""
    size = network_of(pipeline).config.get("sample_size")
    for name, value in {"default_sample_size": size, "_is_unet_config_sample_size_int": isinstance(size, int)}.items():
        if hasattr(pipeline, name):
            setattr(pipeline, name, value)


# ---- videos ----


def kind_of(network: ModelMixin) -> str:
    return type(network).__name__.removeprefix("Prunable")


def native_frames(pipeline: DiffusionPipeline) -> int | None:
    """Frames of the videos that a pipeline draws by itself; None where it draws images."""
    config = network_of(pipeline).config
    return config.get("sample_frames") or config.get("num_frames")


def set_frames(pipeline: DiffusionPipeline, frames: int) -> None:
    """Makes so many frames what a pipeline of videos draws by itself. ValueError where it cannot."""
    if native_frames(pipeline) is None:
        raise ValueError(f"data.frames={frames}: a {type(pipeline).__name__} draws images: choose data of images")
    check_frames(pipeline, frames)
    network: ModelMixin = network_of(pipeline)
    if has_own_positions(network) and frames != (own := native_frames(pipeline)):
        raise ValueError(f"data.frames={frames}: this {kind_of(network)} learnt the positions of {own} frames alone: "
                         "set that, or null")  # fmt: skip
    network.register_to_config(**frames_field(network, frames))


def latents_before(config: Mapping[str, Any], count: int) -> int:
    """Latents that the pipeline puts before the `count` of a video, where a network makes tokens of several along the
    time (CogVideoX 1.5)."""
    return -count % (config.get("patch_size_t") or 1)


def has_own_positions(network: ModelMixin) -> bool:
    """Whether a network learnt the positions of one size and length of videos, those that it was made for. diffusers
    gives a video of another length other positions, which it never learnt, and refuses other sizes."""
    return bool(network.config.get("use_learned_positional_embeddings"))


def only_text_length(network: ModelMixin) -> int | None:
    """The tokens of a prompt, where a network adds positions to so many alone; None where it takes any number."""
    adds = not network.config.get("use_rotary_positional_embeddings", True)
    return network.config.max_text_seq_length if adds or has_own_positions(network) else None


def frames_field(network: ModelMixin, frames: int) -> dict[str, int]:
    """What a network's configuration has so many frames as."""
    return {"num_frames" if "num_frames" in network.config else "sample_frames": frames}


def check_frames(pipeline: DiffusionPipeline, frames: int) -> None:
    """ValueError for a number of frames that an autoencoder of videos does not give back as it took them."""
    step, each = frames_step(pipeline), frames_per_latent(pipeline)
    if frames < 1 or (frames - 1) % step:
        floor = max(0, frames - 1) // step * step + 1
        parity = ", and gives an odd number of them back as they were, so" if step > each else ", so"
        raise ValueError(
            f"videos of {frames} frames do not fit this pipeline: its {type(pipeline.vae).__name__} makes a latent of "
            f"the first frame and one of every {each} others{parity} frames must be 1 more than a multiple of {step}; "
            f"nearest: {floor}, {floor + step}"
        )


def frames_step(pipeline: DiffusionPipeline) -> int:
    """What numbers of frames are multiples of, but for the first frame."""
    compression = frames_per_latent(pipeline)
    # It decodes latents two at a time, the first of an odd number with them, and takes the first frame off these alone.
    return compression * (2 if isinstance(pipeline.vae, AutoencoderKLCogVideoX) else 1)


def frames_per_latent(pipeline: DiffusionPipeline) -> int:
    """Frames that one latent stands for; 1 where each has its own."""
    return getattr(pipeline, "vae_scale_factor_temporal", 1)


def latents_together(pipeline: DiffusionPipeline, frames: int | None = None) -> int | None:
    """The latents, along the time of a video, that its decoder learns from and is timed on together; None of images.

    frames: of a decoder that begins at the first frame, so many from there on, None for all. One that has a latent of
    each frame takes those of a chunk.
    """
    if (count := native_frames(pipeline)) is None:
        return None
    if frames_per_latent(pipeline) == 1:
        return min(video_options(pipeline).decode_chunk_size or count, count)
    return ((frames or count) - 1) // frames_per_latent(pipeline) + 1
