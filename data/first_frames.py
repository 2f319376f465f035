"""What models begin with that make a video of its first frame: pictures by their names, which stand for prompts.

Axes: H and W pixels.
"""

from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from slimstep.data.folder import IMAGE_SUFFIXES
from slimstep.data.pixels import cut_out, decode_rgb
from slimstep.data.streams import Pairs, readable
from slimstep.engine.resolution import Resolution
from slimstep.engine.seeding import generator


def frames_of_videos(pairs: Pairs, count: int) -> dict[str, Tensor]:
    """{caption: uint8 [H, W, 3]}: the first frames of `count` videos, or of all where there are fewer, in a fixed
    shuffled order; of videos with one caption the first."""
    frames: dict[str, Tensor] = {}
    for pair in readable(pairs, "first frames"):
        frames.setdefault(pair["caption"], pair["video"][0])
        if len(frames) == count:
            break
    return frames


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
        frames[name] = cut_out(decode_rgb(path, name), resolution, "center", name).permute(1, 2, 0).contiguous()
    return frames
