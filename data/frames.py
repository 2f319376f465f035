"""From a video file, or a folder of frames, to a clip: decoded, upright, at the rate asked for, cut to a square.

A clip begins where its video begins and is `count` frames long. It is decoded frame by frame and never held at its full
size. Videos are decoded by PyAV, which has FFmpeg in its wheel.

Axes: F frames, H and W pixels.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from slimstep.data.pixels import BrokenImageError, check_framing, cut_out, decode_rgb, flaw_of
from slimstep.engine.resolution import Resolution

EARLY = 1e-3  # seconds by which a frame may come too early for its turn: containers round times
CONTAINERS = {"format_whitelist": "mov,matroska,webm,avi"}  # what data/folder.py VIDEO_SUFFIXES are
Shown = TypeVar("Shown")


class BrokenVideoError(BrokenImageError):
    """A video that cannot be decoded, or is no clip as asked for; the one-line message names it and says why."""


@dataclass(frozen=True)
class Clip:
    """What of a video is taken: `count` frames, `fps` a second (None: as it has them), and what of each."""

    count: int
    fps: float | None
    resolution: Resolution
    crop: str

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be."""
        check_framing(self.resolution, self.crop)
        if self.count < 1:
            raise ValueError(f"data.frames={self.count} must be at least 1")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"data.fps={self.fps} must be above 0, or null for every frame")

    def of_video(self, source: Path | bytes, name: str, crop_name: str) -> Tensor:
        """uint8 [F, H, W, 3] of the resolution, of a video file. Raises BrokenVideoError."""
        return self._of(video_frames(source), name, crop_name, source)

    def of_pictures(self, files: Sequence[Path], rate: float | None, name: str, crop_name: str) -> Tensor:
        """The same of frames that are images, `rate` of them a second."""
        pictures = ((number / (rate or 1), decode_rgb(file, file.name)) for number, file in enumerate(files))
        return self._of(pictures, name, crop_name, files[0])

    def _of(
        self, shown: Iterable[tuple[float, Image.Image]], name: str, crop_name: str, source: Path | bytes
    ) -> Tensor:
        frames = []
        try:
            for image in islice(at_rate(shown, self.fps), self.count):
                frames.append(cut_out(image, self.resolution, self.crop, crop_name).permute(1, 2, 0))
        except Exception as error:  # decoders of damaged files raise whatever they stumble over
            raise BrokenVideoError(f"{name} ({flaw_of_video(error, source)})") from None
        if len(frames) < self.count:
            rate = f" at data.fps={self.fps:g}" if self.fps else ""
            raise BrokenVideoError(f"{name} (it has {len(frames)} frames{rate}, of data.frames={self.count})")
        return torch.stack(frames)


def flaw_of_video(error: Exception, source: Path | bytes) -> str:
    """Why a video cannot be decoded, in one line; FFmpeg's own words stand among numbers."""
    if not (len(source) if isinstance(source, bytes) else source.stat().st_size):
        return "it is empty"
    return getattr(error, "strerror", None) or flaw_of(error, source)


def at_rate(shown: Iterable[tuple[float, Shown]], fps: float | None) -> Iterator[Shown]:
    """Of frames, each with the second from which on it is shown, those that come first at or after 0, 1/fps, 2/fps, …

    Every frame without `fps`. Raises ValueError where there are fewer a second: to show some twice is no motion.
    """
    turn = 0
    for second, frame in shown:
        if fps is None:
            yield frame
        elif second >= (turn + 1) / fps - EARLY:
            raise ValueError(f"it has no frame for every 1/{fps:g} s: data.fps takes its rate or less")
        elif second >= turn / fps - EARLY:
            yield frame
            turn += 1


def check_pyav() -> None:
    """ValueError where PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ValueError(f"videos are decoded by PyAV: pip install 'slimstep[video]' ({error})") from None


def video_frames(source: Path | bytes) -> Iterator[tuple[float, Image.Image]]:
    """(seconds since the first, the upright RGB image) of every frame. Raises what the decoder raises."""
    import av  # late: an optional package

    # FFmpeg looks at contents, not at names: a playlist called .mp4 would have it read the files that it lists.
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), options=CONTAINERS) as container:
        if (stream := container.streams.best("video")) is None:
            raise ValueError("it holds no video")
        first = None
        for frame in container.decode(stream):
            if frame.time is None:
                raise ValueError("its frames have no times")
            first = frame.time if first is None else first
            # A quarter turn counterclockwise for every 90 degrees: phones store what they see, and how they were held.
            upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            yield frame.time - first, Image.fromarray(np.ascontiguousarray(upright))


def in_order(names: Iterable[str]) -> list[str]:
    """By the numbers in them, frame-2 before frame-10."""
    return sorted(names, key=lambda name: [(int(part), "") if part.isdigit() else (-1, part)
                                           for part in re.split(r"(\d+)", name)])  # fmt: skip
