"""From an image file to pixels: decoded, upright, opaque, eight-bit RGB, cut to a square."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from slimstep.data.bare import bare
from slimstep.engine.resolution import Resolution, sides
from slimstep.engine.seeding import generator

CROPS = ("center", "random")
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def shown(sample: Mapping[str, Any]) -> Tensor:
    """What a sample of the data shows: an image, uint8 [3, H, W], or a video [F, H, W, 3]."""
    return sample["video"] if "video" in sample else sample["image"]


class BrokenImageError(ValueError):
    """An image that cannot be decoded; the one-line message names it and says why."""


def decode_rgb(source: Path | bytes, name: str) -> Image.Image:
    """The image, turned as its EXIF orientation says, in RGB; transparency is laid over white. First frame of several.

    Metadata that cannot be read (texts of megabytes, odd EXIF, profiles) is passed over: the pixels count.
    Raises BrokenImageError for pixels that cannot be read in full or are too many for Pillow's `MAX_IMAGE_PIXELS`, and
    for float or 32-bit ones, whose white is undefined.
    """
    try:
        return opened_rgb(source)
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        flaw = flaw_of(error, source)
    try:
        if (pixels := bare(source if isinstance(source, bytes) else source.read_bytes())) is not None:
            return opened_rgb(pixels)
    except Exception:  # the pixels themselves are damaged, and the first error says how
        pass
    raise BrokenImageError(f"{name} ({flaw})")


def opened_rgb(source: Path | bytes) -> Image.Image:
    """The image, upright and in RGB. Raises what decoders raise."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        image.load()
        return to_rgb(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, and as it is where that cannot be read."""
    # ImageOps.exif_transpose writes all tags anew, and fails for those that are odd.
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # whatever the parser stumbles over
        return image
    return image if turn is None else image.transpose(turn)


def flaw_of(error: Exception, source: Path | bytes) -> str:
    """Why an image cannot be decoded, in one line."""
    if isinstance(error, UnidentifiedImageError):  # its own message is an address in memory
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        return "no image of a known kind" if size else "it is empty"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: palette, grey, CMYK, 16-bit grey, with or without transparency."""
    if image.mode.startswith("I;16"):
        grey_HW = np.asarray(image).astype(np.uint16)
        image = Image.fromarray(np.round(grey_HW / 257).astype(np.uint8))  # 65535 is white; convert("L") would clip
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no defined white; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def cut_out(image: Image.Image, resolution: Resolution, crop: str, name: str) -> Tensor:
    """uint8 [3, H, W] of this resolution: one side resized (antialiased), the one that is too long then cropped.

    `crop` "center" keeps the middle, "random" a place that depends on `name` alone.
    """
    place = (0.5, 0.5) if crop == "center" else tuple(torch.rand(2, generator=generator("crop", name)).tolist())
    height, width = sides(resolution)
    cut = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=place)
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous()


def check_framing(resolution: Resolution, crop: str) -> None:
    sides(resolution)
    if crop not in CROPS:
        raise ValueError(f"crop={crop!r} is unknown; choose from {', '.join(CROPS)}")
