"""What the frozen half of a pipeline (VAE, tokenizer, text encoder) makes of images, videos and captions; what it
hashes to.

Axes: B batch, C channels, F frames (f of latents), H and W image (h and w latent) height and width.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimstep.models.conditioning import Conditioning
from slimstep.models.decoding import encoded_images, has_statistics, scaled, scaling_of, statistics
from slimstep.models.family import conditions_of_captions, conditions_of_frames, family_of
from slimstep.models.first_frames import begins_with_frame
from slimstep.models.networks import encoders, network_of
from slimstep.models.sizes import check_frames, latents_before, native_frames, scale_factor

PIXELS_AT_ONCE = 4 * 512**2  # of an autoencoder: some 3 GB in float32 at the 256 channels of Stable Diffusion's
# Written by the libraries into every config; they do not change what a model computes.
CONFIG_NOISE = ("transformers_version", "dtype", "torch_dtype", "architectures", "auto_map")


def encode_images(pipeline, images_BCHW: Tensor, device: torch.device) -> dict[str, Tensor]:
    """What is kept of images uint8 [B, 3, H, W], or of videos [B, F, H, W, 3]: latents [B, C, h, w] or [B, C, f, h, w],
    the posterior's mean, scaled as the stock pipeline of this class unscales latents (models/decoding.py).

    Without a VAE they are the pixels themselves, from -1 to 1. For a pipeline of videos an image is one frame. Where it
    makes videos of their first frame, what it is conditioned on by that is kept, too (families/svd/conditions.py).
    Raises ValueError where VAE and network cannot take the size or the frames, or the latents are not finite.
    """
    if native_frames(pipeline):
        images_BCHW = images_BCHW[:, :, None] if images_BCHW.ndim == 4 else images_BCHW.movedim(-1, 1)
        check_frames(pipeline, images_BCHW.shape[2])
    check_size(pipeline, *images_BCHW.shape[-2:])
    if (vae := family_of(pipeline).codec(pipeline)) is None:
        return {"latents": images_BCHW.to(device).float() / 127.5 - 1}
    slices = images_BCHW.split(rows_at_once(*images_BCHW.shape[2:]))
    means = [encoded_images(vae, x_bCHW.to(device, vae.dtype) / 127.5 - 1) for x_bCHW in slices]
    mean_BChw = torch.cat(means)
    mean_std = [x.to(mean_BChw) for x in statistics(vae.config)] if has_statistics(pipeline) else None
    latents = with_latents_before(pipeline, scaled(mean_BChw, scaling_of(vae), mean_std))
    encoded = finite({"latents": latents}, vae)
    if not begins_with_frame(pipeline):
        return {**encoded}
    first = conditions_of_frames(pipeline, list(images_BCHW[:, :, 0].movedim(1, -1)))
    return {**encoded, **finite(first.tensors, encoder_of(pipeline))}


def with_latents_before(pipeline, latents: Tensor) -> Tensor:
    """The latents, and before those of videos as many of its first as the network is given (models/sizes.py)."""
    if latents.ndim == 4 or not (count := latents_before(network_of(pipeline).config, latents.shape[2])):
        return latents
    return torch.cat([latents[:, :, :1].expand(-1, -1, count, -1, -1), latents], dim=2)


def rows_at_once(*sides: int) -> int:
    """How many images of this height and width, or videos of these frames too, an autoencoder takes at once: its first
    and last levels are as large as they are."""
    return max(1, PIXELS_AT_ONCE // math.prod(sides))


def encode_captions(pipeline, captions: Sequence[str], device: torch.device) -> Conditioning:
    """What is kept of captions, a row for each; nothing where videos are made of their first frames alone, which
    `encode_images` sees."""
    return Conditioning(finite(conditions_of_captions(pipeline, captions, device).tensors, encoder_of(pipeline)))


def encode_nothing(pipeline, device: torch.device) -> Conditioning:
    """What guidance steers away from, one row."""
    return Conditioning(finite(family_of(pipeline).unconditional(pipeline, device).tensors, encoder_of(pipeline)))


def encoder_of(pipeline) -> nn.Module:
    """What is to blame for conditioning that is not finite."""
    return next(iter(encoders(pipeline).values()), network_of(pipeline))


def is_truncated(pipeline, caption: str) -> bool:
    """Whether the caption has more tokens than the text encoder takes, start and end token included."""
    if (tokenizer := getattr(pipeline, "tokenizer", None)) is None:
        return False
    return len(tokenizer(caption, verbose=False).input_ids) > tokenizer.model_max_length


def check_size(pipeline, height: int, width: int) -> None:
    """Sides must survive every halving by the VAE and the UNet, or be cut into a transformer's patches. ValueError."""
    family = family_of(pipeline)
    if height != width and not family.draws_rectangles(pipeline):
        name = type(pipeline).__name__
        raise ValueError(f"data.resolution={height}x{width}: a {name} draws squares: give one number")
    vae_factor, network_factor = scale_factor(pipeline), family.shrinks(network_of(pipeline))
    name, step = "UNet" if hasattr(pipeline, "unet") else "transformer", vae_factor * network_factor
    factors = f"its VAE shrinks by {vae_factor} and its {name} by another {network_factor}"
    factors = factors if vae_factor > 1 else f"its {name} shrinks by {network_factor}"
    if height % step or width % step:
        floors = {side // step * step for side in (height, width)}
        nearest = sorted({max(step, floor + more) for floor in floors for more in (0, step)})
        raise ValueError(
            f"images of {height}x{width} px do not fit this pipeline: {factors}, so sides must be multiples of "
            f"{step}; nearest: {', '.join(map(str, nearest))}"
        )


def finite(encoded: Mapping[str, Tensor], module: nn.Module) -> Mapping[str, Tensor]:
    """`encoded` itself, or a ValueError: half-precision encoders overflow on some inputs."""
    for name, tensor in encoded.items():
        if not tensor.isfinite().all():
            dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
            raise ValueError(
                f"{type(module).__name__} in {dtype} made {name} that are not finite; load it in float32, "
                "and if it is already, its weights are damaged"
            )
    return encoded


@contextmanager
def at_work(pipeline, device: torch.device) -> Iterator[None]:
    """VAE and encoders of prompts on `device`, in eval mode, without gradients; where and as they were afterwards."""
    modules = [module for module in (family_of(pipeline).codec(pipeline), *encoders(pipeline).values()) if module]
    before = [(module, next(module.parameters()).device, module.training) for module in modules]
    # These two warn of truncated captions one by one; the cache counts them.
    encoder = getattr(type(pipeline), "encode_prompt", type(pipeline))
    sources = (encoder.__module__, "transformers.tokenization_utils_base")
    levels = {logger: logger.level for logger in map(logging.getLogger, sources)}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        for module in modules:
            module.to(device).eval()
        with torch.no_grad():
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        for module, home, training in before:
            module.to(home).train(training)


def described(module: nn.Module) -> str:
    """Class and configuration of a model, as JSON that is the same in every process."""
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in CONFIG_NOISE}
    return json.dumps([type(module).__name__, kept], sort_keys=True, default=str)


def module_hash(module: nn.Module) -> str:
    """SHA-256 over the class, the configuration and every weight of a model."""
    sha = hashlib.sha256(described(module).encode())
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 over the class, the vocabulary, the special tokens and the length of a tokenizer."""
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    parts = [type(tokenizer).__name__, tokenizer.model_max_length, special, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
