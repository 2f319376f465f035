"""The `shapes_video` world: one or two shapes that move over a background; captions say where to, and in which order.

Scene i of a split is a function of (seed, i) alone; with more frames it is shown more finely, not for longer. Of two
shapes one moves in the first half, the other in the second. A tenth of all combinations of shapes, colours and
directions, chosen by hash, is held out: no training scene shows one, every held-out scene does.

Axes: F frames, H and W pixels.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from slimstep.data.prompts import PromptSet
from slimstep.data.render import render_scenes
from slimstep.data.scene import Scene, Thing
from slimstep.data.shapes import COLOURS, MOST_PROMPTS, SHAPES, check_split
from slimstep.data.shapes_tokenizer import WORDS
from slimstep.engine.resolution import Resolution, sides
from slimstep.engine.seeding import seed_of

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # y points down, as in pictures
NEAR, FAR = 0.27, 0.73  # where ways begin and end, along each axis
VIDEO_WORDS = tuple(sorted({*WORDS, *DIRECTIONS, "moves", "before", "after"}))
CLAUSE = re.compile(rf"a (?:small |large )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) moves ({'|'.join(DIRECTIONS)})")

Point = tuple[float, float]
Way = tuple[Point, Point]


@dataclass(frozen=True)
class Move:
    """A thing that goes from `start` to `end`, in fractions of the width, in a direction that has a word."""

    thing: Thing
    direction: str
    start: Point
    end: Point
    radius: float

    def at(self, share: float) -> Point:
        """Where it is after this share of its way, which is cut to lie between 0 and 1."""
        share = min(max(share, 0.0), 1.0)
        return tuple(a + share * (b - a) for a, b in zip(self.start, self.end, strict=True))


@dataclass(frozen=True)
class MovingScene:
    """Moves in their order in time, each in its own share of it, over a background of one colour."""

    moves: tuple[Move, ...]
    background: str

    def at(self, time: float) -> Scene:
        """What is to be seen at a time from 0, the first frame, to 1, the last."""
        kind = "single" if len(self.moves) == 1 else "relation"
        centres = tuple(move.at(time * len(self.moves) - turn) for turn, move in enumerate(self.moves))
        radii = tuple(move.radius for move in self.moves)
        return Scene(kind, tuple(move.thing for move in self.moves), (self.background,), centres, radii)

    def combination(self) -> tuple:
        """The attributes by which scenes are held out."""
        return tuple((move.thing.colour, move.thing.shape, move.direction) for move in self.moves)


@dataclass(frozen=True)
class MotionWording:
    """What a caption mentions beside shapes, colours and directions, and whether it begins with what moves last."""

    size: bool = True
    background: bool = True
    last_first: bool = False


def is_held_out(scene: MovingScene) -> bool:
    """Whether this scene's combination of attributes belongs to the held-out tenth."""
    return hashlib.sha256(repr(scene.combination()).encode()).digest()[0] < 26


def scene_at(split: str, seed: int, index: int) -> tuple[MovingScene, MotionWording]:
    """Scene `index` of a split and how its caption words it, a function of the arguments alone."""
    check_split(split)
    source = np.random.Generator(np.random.Philox(key=[seed_of("shapes_video", split, seed), index]))
    wording = MotionWording(*(source.random(2) > 0.25), source.random() < 0.5)
    while is_held_out(scene := _draw(source)) != (split == "heldout"):
        pass
    return scene, wording


def _draw(source: np.random.Generator) -> MovingScene:
    """A scene, held out or not: of one shape with one chance in three."""
    background, *colours = (COLOURS[k] for k in source.permutation(len(COLOURS))[:3])
    count = 1 if source.random() < 1 / 3 else 2
    directions = [tuple(DIRECTIONS)[source.integers(len(DIRECTIONS))] for _ in range(count)]
    choices = free_ways(directions)
    ways = choices[source.integers(len(choices))]
    moves = []
    for colour, direction, way in zip(colours, directions, ways, strict=False):
        size = ("small", "large")[source.integers(2)]
        shape = SHAPES[source.integers(len(SHAPES))]
        shift = source.uniform(-0.02, 0.02, 2)
        start, end = (tuple((np.array(point) + shift).tolist()) for point in way)
        radius = source.uniform(0.145, 0.16) if size == "large" else source.uniform(0.105, 0.12)
        moves.append(Move(Thing(size, colour, shape), direction, start, end, float(radius)))
    return MovingScene(tuple(moves), background)


def way_of(direction: str, aside: float) -> Way:
    """Start and end of a way across the picture, `aside` on the axis that it does not go along."""
    dx, dy = DIRECTIONS[direction]
    ends = (NEAR, FAR) if dx + dy > 0 else (FAR, NEAR)
    start, end = ((along, aside) if dx else (aside, along) for along in ends)
    return start, end


def free_ways(directions: Sequence[str]) -> list[tuple[Way, ...]]:
    """All choices of ways in these directions, the earlier first, along which things never come close.

    The corners of a square are starts and ends of two ways: the second must wait beside the first way, and not end
    where that does. One alone may also go through the middle.
    """
    if len(directions) == 1:
        return [(way_of(directions[0], aside),) for aside in (NEAR, 0.5, FAR)]
    pairs = product(*([way_of(direction, aside) for aside in (NEAR, FAR)] for direction in directions))
    return [(first, second) for first, second in pairs if second[0] not in first and second[1] != first[1]]


def caption(scene: MovingScene, wording: MotionWording = MotionWording()) -> str:
    """As in `a large red circle moves left before a small blue square moves up on a yellow background`."""
    clauses = []
    for move in scene.moves:
        name = " ".join(filter(None, (wording.size and move.thing.size, move.thing.colour, move.thing.shape)))
        clauses.append(f"a {name} moves {move.direction}")
    content = " after ".join(reversed(clauses)) if wording.last_first else " before ".join(clauses)
    return f"{content} on a {scene.background} background" if wording.background else content


def motions(text: str) -> list[tuple[str, str, str]]:
    """What a caption says of motion: (colour, shape, direction) of each thing, the one that moves first before."""
    found = CLAUSE.findall(text)
    return found[::-1] if " after " in text else found


class ShapesVideoPairs:
    """The videos: `ds[i]` is {"video": uint8 [frames, H, W, 3], "caption": str}."""

    allowed_broken = 0

    def __init__(
        self, split: str = "train", size: int = 10_000, seed: int = 0, resolution: Resolution = 64, frames: int = 9
    ) -> None:
        check_split(split)
        if size < 1:
            raise ValueError(f"data.pairs.size={size} must be at least 1")
        if frames < 2:
            raise ValueError(f"data.frames={frames}: nothing moves in fewer than 2 frames")
        sides(resolution)
        self.split, self.size, self.seed, self.resolution, self.frames = split, size, seed, resolution, frames

    @property
    def fingerprint(self) -> str:
        return f"shapes_video-1/{self.split}/{self.size}/{self.seed}/{self.resolution}/{self.frames}"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        scene, wording = self.scene(index)
        return {"video": video_of(scene, self.frames, self.resolution), "caption": caption(scene, wording)}

    def caption(self, index: int) -> str:
        """The caption alone, without drawing the frames."""
        return caption(*self.scene(index))

    def scene(self, index: int) -> tuple[MovingScene, MotionWording]:
        """What item `index` shows and how its caption words it."""
        if not 0 <= index < self.size:
            raise IndexError(f"shapes_video scene {index} of {self.size}")
        return scene_at(self.split, self.seed, index)


def video_of(scene: MovingScene, frames: int, resolution: Resolution = 64) -> Tensor:
    """uint8 [frames, H, W, 3], equally far apart in time, the first and the last instant included."""
    scenes = [scene.at(time) for time in torch.linspace(0, 1, frames).tolist()]
    return render_scenes(scenes, resolution).permute(0, 2, 3, 1).contiguous()


def shapes_video_prompts(split: str = "heldout", n: int = 64, seed: int = 0) -> PromptSet:
    """The fully worded captions of `n` scenes of a split, for scoring; half of those of two shapes begin with the
    one that moves last."""
    if not 1 <= n <= MOST_PROMPTS:
        raise ValueError(f"data.prompts.n={n} must lie between 1 and {MOST_PROMPTS:,}")
    scenes = (scene_at(split, seed, index) for index in range(n))
    prompts = tuple(caption(scene, replace(MotionWording(), last_first=w.last_first)) for scene, w in scenes)
    return PromptSet(prompts, name=f"shapes_video-{split}-{n}-seed{seed}")
