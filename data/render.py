"""Draws shapes scenes in batches, anti-aliased by signed distances.

Axes: B scenes, H and W pixels, C colour channels. Lengths are fractions of the width; y points down.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slimstep.data.scene import Scene
from slimstep.engine.resolution import Resolution, sides

RGB = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 80, 225),
    "yellow": (245, 215, 50),
    "purple": (150, 50, 185),
    "cyan": (70, 210, 225),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
FRAME_WIDTH = 0.055


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.hypot(x, y) - r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.9 * r


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Equilateral, tip up, circumradius 1.2 r, hung so that its box is centred."""
    y = y - 0.3 * r
    slanted = x.abs() * (math.sqrt(3) / 2) - y / 2
    return torch.maximum(slanted, y) - 0.6 * r


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.maximum(torch.maximum(x, y) - r, torch.minimum(x, y) - 0.32 * r)


def _ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.78 * r).abs() - 0.22 * r


DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross, "ring": _ring}


def _paint(canvas_BCHW: Tensor, rows: Tensor, cover_nHW: Tensor, rgb_nC: Tensor) -> None:
    """Lays colours over some scenes of the canvas, `cover` between 0 and 1."""
    cover = cover_nHW[:, None]
    canvas_BCHW[rows] = torch.lerp(canvas_BCHW[rows], rgb_nC[:, :, None, None].expand_as(canvas_BCHW[rows]), cover)


def render_scenes(scenes: Sequence[Scene], resolution: Resolution = 64) -> Tensor:
    """uint8 [B, 3, H, W]; what is no square shows the scene stretched."""
    height, width = sides(resolution)
    y_HW, x_HW = torch.meshgrid(*((torch.arange(side) + 0.5) / side for side in (height, width)), indexing="ij")
    colours = torch.tensor([[RGB[s.background[0]], RGB[s.background[-1]]] for s in scenes], dtype=torch.float32)
    right_half = (x_HW > 0.5)[None, None]
    canvas = torch.where(right_half, colours[:, 1, :, None, None], colours[:, 0, :, None, None])
    framed = [b for b, scene in enumerate(scenes) if scene.frame]
    if framed:
        edge_HW = torch.maximum((x_HW - 0.5).abs(), (y_HW - 0.5).abs()) - (0.5 - FRAME_WIDTH)
        cover = (0.5 + edge_HW * max(height, width)).clamp(0, 1).expand(len(framed), -1, -1)
        rgb = torch.tensor([RGB[scenes[b].frame] for b in framed], dtype=torch.float32)
        _paint(canvas, torch.tensor(framed), cover, rgb)
    for layer in range(max(len(scene.centres) for scene in scenes)):
        for shape, distance in DISTANCES.items():
            drawn = [
                (b, *scene.centres[layer], scene.radii[layer], *RGB[scene.objects[layer].colour])
                for b, scene in enumerate(scenes)
                if layer < len(scene.centres) and scene.objects[layer].shape == shape
            ]
            if not drawn:
                continue
            table = torch.tensor(drawn, dtype=torch.float32)
            x, y, r = (table[:, column, None, None] for column in (1, 2, 3))
            cover = (0.5 - distance(x_HW - x, y_HW - y, r) * max(height, width)).clamp(0, 1)
            _paint(canvas, table[:, 0].long(), cover, table[:, 4:])
    return canvas.round().to(torch.uint8)
