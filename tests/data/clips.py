"""Small video files for tests: written by PyAV, every frame of one colour that tells it from the others."""

import io
from pathlib import Path

import av
import numpy as np
import torch


def frames_of_greys(count: int, size: tuple[int, int] = (24, 16)) -> np.ndarray:
    """uint8 [count, H, W, 3]: frame k is grey of 40 + 8k, its left half darker by 24."""
    frames = np.zeros((count, size[1], size[0], 3), dtype=np.uint8)
    frames += (40 + 8 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    frames[:, :, : size[0] // 2] -= 24
    return frames


def clip_bytes(count: int = 12, fps: int = 8, kind: str = "mp4", size: tuple[int, int] = (24, 16)) -> bytes:
    """A video of that many frames, nearly without loss."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream("libvpx-vp9" if kind == "webm" else "libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.options = *size, "yuv444p", {"qp": "4", "crf": "4"}
        for frame in frames_of_greys(count, size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def numbers(video_FHW3: torch.Tensor) -> list[int]:
    """Which frames of `frames_of_greys` these are, by their right halves."""
    right_F = video_FHW3[:, :, video_FHW3.shape[2] // 2 :].float().mean((1, 2, 3))
    return ((right_F - 40) / 8).round().int().tolist()


def turned(clip: bytes) -> bytes:
    """The same mp4, stored as a phone held upright stores it: to be shown a quarter turn clockwise."""
    at = clip.index(b"tkhd") + 4 + 40  # the matrix follows the version, times, numbers, layer and volume
    one, minus = (1 << 16).to_bytes(4), (-(1 << 16)).to_bytes(4, signed=True)
    zero, unit = bytes(4), (1 << 30).to_bytes(4)
    assert clip[at : at + 4] == one, "the matrix of the track begins with 1"
    matrix = b"".join((zero, one, zero, minus, zero, zero, zero, zero, unit))
    return clip[:at] + matrix + clip[at + 36 :]


def write_video_folder(root: Path, names: list[str], **options) -> Path:
    """NAME.mp4 with a caption in NAME.txt beside it."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.mp4").write_bytes(clip_bytes(**options))
        (root / f"{name}.txt").write_text(f"caption of {name}")
    return root
