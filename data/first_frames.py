"""What models begin with that make a video of its first frame: pictures by their names, which stand for prompts.

Axes: H and W pixels.
"""

import logging
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from slimstep.data.folder import IMAGE_SUFFIXES, few, read_folder
from slimstep.data.pixels import cut_out, decode_rgb
from slimstep.data.streams import Pairs, readable
from slimstep.engine.resolution import Resolution
from slimstep.engine.seeding import generator

log = logging.getLogger("slimstep")


def frames_of_videos(pairs: Pairs, count: int) -> dict[str, Tensor]:
    """{caption: uint8 [H, W, 3]}: the first frames of `count` videos, or of all where there are fewer, in a fixed
    shuffled order; of videos with one caption the first."""
    frames: dict[str, Tensor] = {}
    for pair in readable(pairs, "first frames"):
        frames.setdefault(pair["caption"], pair["video"][0])
        if len(frames) == count:
            break
    return frames


def captioned_frames_in_folder(folder: str | Path, resolution: Resolution, count: int) -> dict[str, Tensor]:
    """{caption: uint8 [H, W, 3]} of the images in a folder that have captions, which is read as data of images are; as
    `frames_in_folder` does, of images with one caption the first. ValueError for a folder without any."""
    contents = read_folder(Path(folder), None)
    if not contents.pairs:
        raise ValueError(f"data.first_frames={folder}: this model reads captions, and {contents.flaws[0]}")
    if contents.flaws:
        log.warning(f"{len(contents.flaws)} images of data.first_frames are left out: {few(contents.flaws)}")
    order = torch.randperm(len(contents.pairs), generator=generator("first frames")).tolist()
    frames: dict[str, Tensor] = {}
    for name, caption in (contents.pairs[i] for i in order):
        if len(frames) < count and caption not in frames:
            frames[caption] = frame_at(Path(folder) / name, resolution, name)
    return frames


def frame_at(path: Path, resolution: Resolution, name: str) -> Tensor:
    return cut_out(decode_rgb(path, name), resolution, "center", name).permute(1, 2, 0).contiguous()


def frames_in_folder(folder: str | Path, resolution: Resolution, count: int) -> dict[str, Tensor]:
    """{path under the folder: uint8 [H, W, 3]}: the middles of `count` images, or of all where there
    are fewer, in a fixed shuffled order. ValueError for a folder without any."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"data.first_frames={folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    order = torch.randperm(len(paths), generator=generator("first frames")).tolist()
    frames = {}
    for path in islice((paths[i] for i in order), count):
        name = str(path.relative_to(folder))
        frames[name] = frame_at(path, resolution, name)
    return frames
