"""Videos on a page, models beside each other: still at their first frame until they are played, without a script.

images/MODEL/steps-S-guidance-G/NNN.webp    a video as it was drawn, an animated WebP: any browser shows it
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageSequence

from slimstep.eval.record import Evaluation

FRAME_MS = 125  # eight frames a second, as diffusers' examples write videos
PICTURE = 256  # pixels on the page: larger images are scaled down, smaller ones have their pixels repeated
COLUMNS = 4  # prompts on the page
QUALITY, PAGE_QUALITY = 90, 75  # of WebP, where it is not lossless


@dataclass(frozen=True)
class Player:
    """A video of a prompt as two images of a page: its first frame, and all of it."""

    still: str
    moving: str
    alt: str


@dataclass(frozen=True)
class Videos:
    """Rows of players, one row per model and setting, each column one prompt and one noise."""

    prompts: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Player, ...]], ...]


def write_animation(frames: Sequence[Image.Image], file: Path | io.BytesIO, quality: int = QUALITY) -> None:
    """Frames as an animated WebP that is played again and again; small ones lose nothing."""
    first, *others = frames
    lossless = max(first.size) <= PICTURE and quality == QUALITY
    first.save(file, "webp", save_all=True, append_images=others, duration=FRAME_MS, loop=0, lossless=lossless,
               quality=quality, method=4)  # fmt: skip


def videos_of(folder: Path, evaluation: Evaluation | None) -> Videos | None:
    """The videos that a run kept of its first prompts; None where it kept none, as of models of images."""
    if evaluation is None:
        return None
    prompts, rows = evaluation.shown[:COLUMNS], []
    for point in evaluation.points:
        place = folder / f"images/{point.model}/steps-{point.steps}-guidance-{point.guidance}"
        files = [place / f"{number:03d}.webp" for number in range(len(prompts))]
        if files and all(file.is_file() for file in files):
            label = f"{point.model}, {point.steps} steps, guidance {point.sampled_guidance:g}"
            rows.append((label, tuple(player(file, f"{prompt}, drawn by {label}")
                                      for file, prompt in zip(files, prompts, strict=True))))  # fmt: skip
    return Videos(tuple(prompts), tuple(rows)) if rows else None


def player(file: Path, alt: str) -> Player:
    frames = page_frames(file)
    return Player(data_uri(frames[:1]), data_uri(frames), alt)


def page_frames(file: Path) -> list[Image.Image]:
    """The frames of an animated WebP as the page shows them."""
    with Image.open(file) as stored:
        return [as_shown(frame) for frame in ImageSequence.Iterator(stored)]


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture with its pixels repeated: those of the bundled models have 64."""
    times = max(1, PICTURE // max(image.size))
    return image.resize([times * side for side in image.size], Image.Resampling.NEAREST)


def as_shown(image: Image.Image) -> Image.Image:
    """An image about as large as a page shows it."""
    image = image.convert("RGB")
    image = enlarged(image)
    image.thumbnail((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    return image


def data_uri(frames: Sequence[Image.Image]) -> str:
    """Frames, or one, as a WebP for an `<img>`."""
    file = io.BytesIO()
    write_animation(frames, file, PAGE_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
