"""Sizes of pictures and latents: a number where it is the side of a square, and "HEIGHTxWIDTH" where it is none."""

import re

Resolution = int | str
FORM = re.compile(r"(?P<height>[1-9]\d*)(x(?P<width>[1-9]\d*))?")


def sides(resolution: Resolution) -> tuple[int, int]:
    """Height and width. ValueError for what is neither a number from 1 up nor two of them, as in 480x720."""
    if not (found := FORM.fullmatch(str(resolution))):
        raise ValueError(f"resolution={resolution} must be a number of pixels from 1 up, or HEIGHTxWIDTH as in 480x720")
    return int(found["height"]), int(found["width"] or found["height"])


def printed(resolution: Resolution) -> str:
    """As it is printed: 480×720."""
    return "×".join(map(str, sides(resolution)))


def resolution_of(height: int, width: int) -> Resolution:
    return height if height == width else f"{height}x{width}"
