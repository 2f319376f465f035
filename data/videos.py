"""Anybody's videos with captions: a folder of them, of files or of frames as images, or WebDataset tars.

The layouts, captions, splits and flaws are those of images (data/images.py, data/webdataset.py); what is taken of a
video is in data/frames.py. Item i: {"video": uint8 [frames, H, W, 3], "caption": str}.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from slimstep.data.folder import VIDEO_SUFFIXES, Contents, read_folder
from slimstep.data.frames import Clip, check_pyav, in_order
from slimstep.data.images import ImageFolderPairs
from slimstep.data.pixels import BrokenImageError
from slimstep.data.streams import Entry
from slimstep.data.webdataset import WebDatasetPairs


@dataclass(eq=False)
class VideoFolderPairs(ImageFolderPairs):
    """The videos under `root`: files, or, where there are none, folders of frames as images.

    A clip is the first `frames` frames, `fps` of them a second, or as the video has them where that is null. Frames as
    images do not say how many belong to a second: `frame_rate` does, and is needed beside `fps` alone.
    """

    frames: int = field(kw_only=True)
    fps: float | None = field(default=None, kw_only=True)
    frame_rate: float | None = field(default=None, kw_only=True)
    KIND: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        self.clip = Clip(self.frames, self.fps, self.resolution, self.crop)
        super().__post_init__()

    def read(self) -> Contents:
        contents = read_folder(self.root, self.caption_column, "video", VIDEO_SUFFIXES)
        self.frames_of = {name: in_order(names) for name, names in contents.frames.items()}
        if not self.frames_of:
            check_pyav()
        elif self.fps is not None and self.frame_rate is None:
            said = "does not say how many of its images belong to a second"
            raise ValueError(f"data.fps={self.fps:g}: {self.root} {said}: give data.frame_rate, or data.fps=null")
        return contents

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any name, size, time of change or caption of the videos, and with what is taken of them."""
        taken = [self.resolution, self.crop, self.frames, self.fps, self.frame_rate]
        sha = hashlib.sha256(json.dumps(taken).encode())
        for name, caption in self.pairs:
            for file in self.frames_of.get(name, [name]):
                stat = (self.root / file).stat()
                sha.update(json.dumps([file, stat.st_size, stat.st_mtime_ns, caption]).encode())
        return f"videofolder-1/{sha.hexdigest()[:16]}"

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        source, name = self.source(index)
        if files := self.frames_of.get(name):
            video = self.clip.of_pictures([self.root / file for file in files], self.frame_rate, name, name)
        else:
            video = self.clip.of_video(source, name, name)
        return {"video": video, "caption": self.caption(index)}


@dataclass(eq=False)
class WebDatasetVideos(WebDatasetPairs):
    """The samples in tars (data/webdataset.py) that are a video file and a caption; `video_column` names the video's
    suffix, which is found where a sample has one video. What is taken of a video: `VideoFolderPairs`."""

    frames: int = field(kw_only=True)
    fps: float | None = field(default=None, kw_only=True)
    video_column: str | None = field(default=None, kw_only=True)
    KIND: ClassVar[str] = "video"
    SUFFIXES: ClassVar[tuple[str, ...]] = VIDEO_SUFFIXES

    def __post_init__(self) -> None:
        check_pyav()
        self.image_column = self.video_column
        self.clip = Clip(self.frames, self.fps, self.resolution, self.crop)
        super().__post_init__()

    @property
    def taken(self) -> list:
        return [*super().taken, "video", self.frames, self.fps]

    def sample(self, entry: Entry) -> dict[str, Tensor | str]:
        """{"video": uint8 [frames, H, W, 3], "caption": str}. Raises BrokenVideoError."""
        if entry.flaw:
            raise BrokenImageError(entry.complaint)
        return {"video": self.clip.of_video(entry.image, entry.name, entry.key), "caption": entry.caption}
