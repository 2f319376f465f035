"""Sizes of images that a package draws beside its model's own, in pixels: 512x768, or a range, 512-1024x512-1024.

One graph serves all of them: along a side that differs it takes any number of latents from the least to the most, in
steps that the network's downsampling demands.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SIZE = re.compile(r"(\d+)(?:-(\d+))?x(\d+)(?:-(\d+))?")
Side = tuple[int, int]  # from the least to the most, both among them


@dataclass(frozen=True)
class Sizes:
    """Images of these heights and widths in pixels."""

    height: Side
    width: Side

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.height, self.width

    def __str__(self) -> str:
        return "x".join(str(least) if least == most else f"{least}-{most}" for least, most in self.sides)

    def shrunk(self, factor: int) -> "Sizes":
        """The same in latents of so many pixels along a side."""
        height, width = ((least // factor, most // factor) for least, most in self.sides)
        return Sizes(height, width)

    def every(self, step: int) -> Iterator[tuple[int, int]]:
        """Height and width of all of them, in steps of so many pixels."""
        heights, widths = (range(least, most + 1, step) for least, most in self.sides)
        return ((height, width) for height in heights for width in widths)


def sizes_from(text: str) -> Sizes:
    """ValueError for what is no HEIGHTxWIDTH."""
    match = SIZE.fullmatch(text)
    a, b, c, d = (0, 0, 0, 0) if match is None else [int(number or 0) for number in match.groups()]
    sizes = Sizes((a, b or a), (c, d or c))
    if not all(0 < least <= most for least, most in sizes.sides):
        ways = "512x768, or a range of a side: 512-1024x768"
        raise ValueError(f"package.sizes={text} must be HEIGHTxWIDTH in pixels: {ways}")
    return sizes


def check_multiples(sizes: Sizes, step: int) -> None:
    """ValueError for sides that are no multiples of so many pixels."""
    if any(number % step for side in sizes.sides for number in side):
        near = [(max(1, round(least / step)) * step, max(1, round(most / step)) * step) for least, most in sizes.sides]
        reason = f"its network takes sides that are multiples of {step} px"
        raise ValueError(f"package.sizes={sizes}: {reason}; nearest: {Sizes(near[0], near[1])}")


def corners(every: Sequence[Sizes]) -> list[tuple[int, int]]:
    """(height, width) of the smallest, of the widest of the low ones, and of the largest of each; none twice."""
    ends = ((0, 0), (0, 1), (1, 1))
    return list(dict.fromkeys((sizes.height[h], sizes.width[w]) for sizes in every for h, w in ends))


def spans(every: Sequence[Sizes], step: int) -> tuple[range, range]:
    """Heights and widths from the least to the most of all, in steps of so many pixels."""
    heights, widths = zip(*(sizes.sides for sizes in every), strict=True)
    least_most = [(min(least for least, _ in side), max(most for _, most in side)) for side in (heights, widths)]
    first, second = (range(least, most + 1, step) for least, most in least_most)
    return first, second
