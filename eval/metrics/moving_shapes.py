"""Whether videos of shapes follow their captions: what is drawn in the named colours, where it goes, in which order.

No network looks at them: the colours of `data=shapes_video` are few and known, so that pixels tell. The bundled scorer
knows nothing of motion.

Axes: B videos, F frames, H and W pixels, N frames in which something is seen, K candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimstep.data.render import DISTANCES, RGB
from slimstep.data.shapes_video import DIRECTIONS, motions
from slimstep.eval.metrics.metric import Metric

SMALLEST = 0.006  # of all pixels; the smallest shape has 0.02
FAR_ENOUGH = 0.2  # of the picture; the ways have 0.46
RADII = torch.linspace(0.09, 0.18, 10)


def seen_as(video_FHW3: Tensor, colour: str) -> Tensor:
    """Bool[F, H, W]: which pixels are nearest to this colour of all that are drawn with."""
    palette = torch.tensor(list(RGB.values()), dtype=torch.float32)
    nearest = (video_FHW3.float()[..., None, :] - palette).square().sum(-1).argmin(-1)
    return nearest == list(RGB).index(colour)


def centres(mask_FHW: Tensor) -> Tensor:
    """[F, 2]: x and y of what is seen in each frame, fractions of the sides; nan where next to nothing is."""
    count_F = mask_FHW.sum((1, 2)).float()
    along = [torch.linspace(0.5, side - 0.5, side) / side for side in mask_FHW.shape[1:]]
    y_F, x_F = (mask_FHW * along[0][:, None]).sum((1, 2)), (mask_FHW * along[1]).sum((1, 2))
    found = torch.stack([x_F, y_F], 1) / count_F[:, None]
    return torch.where((count_F >= SMALLEST * mask_FHW[0].numel())[:, None], found, torch.nan)


def direction_of(centre_F2: Tensor) -> str | None:
    """Where it goes between the first frame that shows it and the last one; None where it hardly moves."""
    seen_N2 = centre_F2[~centre_F2.isnan().any(1)]
    if len(seen_N2) < 2:
        return None
    moved = seen_N2[-1] - seen_N2[0]
    axis = int(moved.abs().argmax())
    if moved[axis].abs() < FAR_ENOUGH:
        return None
    way = (int(moved[0].sign()), 0) if axis == 0 else (0, int(moved[1].sign()))
    return next(name for name, towards in DIRECTIONS.items() if towards == way)


def halfway(centre_F2: Tensor) -> float:
    """The frame from which on it is nearer to its end than to its beginning."""
    places_N = (~centre_F2.isnan().any(1)).nonzero().flatten()
    seen_N2 = centre_F2[places_N]
    from_start, to_end = ((seen_N2 - seen_N2[place]).norm(dim=1) for place in (0, -1))
    return float(places_N[from_start >= to_end][0])


def shape_of(mask_HW: Tensor) -> str | None:
    """The shape whose picture, of any size, overlaps most with what is seen; None where next to nothing is."""
    if mask_HW.sum() < SMALLEST * mask_HW.numel():
        return None
    sides = torch.tensor(mask_HW.shape)
    places_N2 = (mask_HW.nonzero() + 0.5) / sides
    y, x = (places_N2.quantile(0.01, dim=0) + places_N2.quantile(0.99, dim=0)) / 2  # of its box, but for stray pixels
    y_HW, x_HW = torch.meshgrid(*((torch.arange(int(side)) + 0.5) / side for side in sides), indexing="ij")
    overlap = {}
    for shape, distance in DISTANCES.items():
        drawn_KHW = distance(x_HW - x, y_HW - y, RADII[:, None, None]) < 0
        both, either = (drawn_KHW & mask_HW).sum((1, 2)), (drawn_KHW | mask_HW).sum((1, 2))
        overlap[shape] = float((both / either).max())
    return max(overlap, key=lambda shape: overlap[shape])


def followed(video_FHW3: Tensor, prompt: str) -> dict[str, bool]:
    """Whether everything that the caption names is there, has its shape in most frames, and goes where it says; and, of
    two shapes, whether the right one goes first."""
    named, tracks, shapes = motions(prompt), [], []
    for colour, shape, _ in named:
        mask_FHW = seen_as(video_FHW3, colour)
        tracks.append(centres(mask_FHW))
        shapes.append(sum(shape_of(mask_HW) == shape for mask_HW in mask_FHW) > len(mask_FHW) / 2)
    there = all(not track[[0, -1]].isnan().any() for track in tracks)
    right = {
        "colours": there,
        "shapes": all(shapes),
        "directions": all(direction_of(track) == way for track, (_, _, way) in zip(tracks, named, strict=True)),
    }
    if len(named) == 2:
        right["order"] = right["directions"] and halfway(tracks[0]) < halfway(tracks[1])
    return {**right, "all": all(right.values())}


class FollowedDirections(Metric):
    """How many of the shapes that a caption names go where it says, in percent."""

    of = "videos"

    def __call__(self, videos_BFHW3: Tensor, prompts: Sequence[str], reference: Tensor | None = None) -> Tensor:
        return torch.tensor([share_of_directions(*each) for each in zip(videos_BFHW3.cpu(), prompts, strict=True)])


def share_of_directions(video_FHW3: Tensor, prompt: str) -> float:
    """In percent. ValueError for a prompt that says no direction."""
    named = motions(prompt)
    if not named:
        raise ValueError(f"the prompt {prompt!r} names no shape that moves, as captions of data=shapes_video do")
    right = [direction_of(centres(seen_as(video_FHW3, colour))) == way for colour, _, way in named]
    return 100 * sum(right) / len(right)
