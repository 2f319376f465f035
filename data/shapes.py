"""The `shapes` world: captioned scenes of few, large, distinct things and the relations between them.

Scene i of a split is a function of (seed, i) alone. A tenth of all attribute combinations, chosen by hash, is held out:
no training scene shows one, every held-out scene does. What is drawn is in `data/render.py`.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from slimstep.data.prompts import PromptSet
from slimstep.data.render import render_scenes
from slimstep.data.scene import REVERSED, Scene, Thing
from slimstep.engine.resolution import Resolution, sides
from slimstep.engine.seeding import seed_of

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "white", "black")
SIZES = ("small", "large")
RELATIONS = ("above", "below", "left of", "right of", "inside", "around")
POSITIONS = {
    f"{row} {column}".strip() or "centre": (x, y)
    for row, y in (("top", 0.26), ("", 0.5), ("bottom", 0.74))
    for column, x in (("left", 0.26), ("", 0.5), ("right", 0.74))
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
LAYOUTS = {
    2: (((0.28, 0.5), (0.72, 0.5)), ((0.5, 0.28), (0.5, 0.72))),
    3: (((0.5, 0.28), (0.27, 0.7), (0.73, 0.7)), ((0.27, 0.3), (0.73, 0.3), (0.5, 0.72))),
    4: (((0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)),),
}
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Wording:
    """What a caption mentions, and in which order. Colours of related things are always named: they tell them apart."""

    size: bool = True
    colour: bool = True
    position: bool = True
    background: bool = True
    frame: bool = True
    background_first: bool = False


def is_held_out(scene: Scene) -> bool:
    """Whether this scene's combination of attributes belongs to the held-out tenth."""
    return hashlib.sha256(repr(scene.combination()).encode()).digest()[0] < 26


class _Dice:
    """Cheap choices from one block of uniform numbers."""

    def __init__(self, uniforms: Iterable[float]) -> None:
        self._uniforms = iter(uniforms)

    def below(self, probability: float) -> bool:
        return next(self._uniforms) < probability

    def among(self, choices: Iterable):
        choices = tuple(choices)
        return choices[int(next(self._uniforms) * len(choices))]

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._uniforms)


def _related(dice: _Dice, things: tuple[Thing, Thing], relation: str) -> tuple[tuple[Thing, ...], list, list]:
    """Things, centres and radii (in painting order) of two objects in a relation."""
    if relation in ("inside", "around"):
        outer_first = relation == "around"
        outer, inner = things if outer_first else things[::-1]
        outer = replace(outer, size="large", shape=outer.shape if outer.shape in ("circle", "square") else "square")
        inner = replace(inner, size="small")
        centre = (dice.between(0.4, 0.6), dice.between(0.4, 0.6))
        radii = [dice.between(0.29, 0.32), dice.between(0.145, 0.155)]
        return ((outer, inner) if outer_first else (inner, outer)), [centre, centre], radii
    low, high = 0.26 + dice.between(-0.02, 0.02), 0.74 + dice.between(-0.02, 0.02)
    first, second = (low, high) if relation in ("above", "left of") else (high, low)
    aside = [0.5 + dice.between(-0.07, 0.07) for _ in things]
    along = ((first, aside[0]), (second, aside[1]))
    centres = [(a, b) if relation in ("left of", "right of") else (b, a) for a, b in along]
    return things, centres, [_radius(dice, thing.size) for thing in things]


def _radius(dice: _Dice, size: str) -> float:
    return dice.between(0.2, 0.22) if size == "large" else dice.between(0.145, 0.155)


def _draw(uniforms: np.ndarray) -> Scene:
    """A scene from 32 uniform numbers, held out or not."""
    dice = _Dice(uniforms)
    split_background, framed = dice.below(0.12), dice.below(0.12)
    palette = list(COLOURS)
    background = tuple(palette.pop(int(dice.between(0, len(palette)))) for _ in range(2))[: 1 + split_background]
    frame = palette.pop(int(dice.between(0, len(palette)))) if framed else ""
    first = Thing(dice.among(SIZES), palette.pop(int(dice.between(0, len(palette)))), dice.among(SHAPES))
    kind = dice.among(("single",) * 4 + ("count",) * 4 + ("relation",) * 12)
    look = {"background": background, "frame": frame, "kind": kind}
    if kind == "single":
        position = dice.among(POSITIONS)
        x, y = (c + dice.between(-0.02, 0.02) for c in POSITIONS[position])
        return Scene(things=(first,), centres=((x, y),), radii=(_radius(dice, first.size),), position=position, **look)
    if kind == "count":
        layout = dice.among(LAYOUTS[count := dice.among(NUMBERS)])
        dx, dy, radius = dice.between(-0.04, 0.04), dice.between(-0.04, 0.04), dice.between(0.145, 0.155)
        centres = tuple((x + dx, y + dy) for x, y in layout)
        first = replace(first, size="small")
        return Scene(things=(first,), centres=centres, radii=(radius,) * count, count=count, **look)
    second = Thing(dice.among(SIZES), palette.pop(int(dice.between(0, len(palette)))), dice.among(SHAPES))
    relation = dice.among(RELATIONS)
    things, centres, radii = _related(dice, (first, second), relation)
    return Scene(things=things, centres=tuple(centres), radii=tuple(radii), relation=relation, **look)


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; the shapes world has {SPLITS}")


def scene_at(split: str, seed: int, index: int) -> tuple[Scene, Wording]:
    """Scene `index` of a split and how its caption words it, a function of the arguments alone."""
    check_split(split)
    source = np.random.Generator(np.random.Philox(key=[seed_of("shapes", split, seed), index]))
    wording = Wording(*(source.random(5) > (0.25, 0.1, 0.2, 0.25, 0.2)), source.random() < 0.3)
    while is_held_out(scene := _draw(source.random(32))) != (split == "heldout"):
        pass
    return scene, wording


def caption(scene: Scene, wording: Wording = Wording()) -> str:
    """The scene in words, as in `a large red circle above a small blue square on a yellow background`."""
    colour = wording.colour or scene.kind == "relation"
    names = [" ".join(filter(None, (wording.size and t.size, colour and t.colour, t.shape))) for t in scene.things]
    if scene.kind == "count":
        plural = "es" if scene.things[0].shape == "cross" else "s"
        content = f"{NUMBERS[scene.count]} {names[0]}{plural}"
    elif scene.kind == "relation":
        content = f"a {names[0]} {scene.relation} a {names[1]}"
    else:
        preposition = "in" if scene.position == "centre" else "at"
        content = f"a {names[0]}" + (f" {preposition} the {scene.position}" if wording.position else "")
    ground = f"on a {' and '.join(scene.background)} background" if wording.background else ""
    if scene.frame and wording.frame:
        ground = f"{ground} with a {scene.frame} frame".strip()
    if ground and wording.background_first:
        return f"{ground}, {content}"
    return f"{content} {ground}".strip()


def hard_negatives(scene: Scene, wording: Wording = Wording(), turn: int = 0) -> dict[str, str]:
    """Captions that are nearly right, by what is wrong in them; those the wording cannot tell apart are left out.

    `turn` chooses among equally wrong values (which other shape, count, position …).
    """
    first, *rest = scene.things

    def other(choices: Iterable, *excluded):
        left = [choice for choice in choices if choice not in excluded]
        return left[turn % len(left)]

    wrong = {
        "wrong shape": replace(scene, things=(replace(first, shape=other(SHAPES, first.shape)), *rest)),
        "wrong colour": replace(scene, things=(replace(first, colour=other(COLOURS, first.colour)), *rest)),
        "wrong background": replace(scene, background=(other(COLOURS, *scene.background), *scene.background[1:])),
    }
    if scene.kind == "count":
        wrong["wrong count"] = replace(scene, count=other(NUMBERS, scene.count))
    elif scene.kind == "single":
        wrong["wrong position"] = replace(scene, position=other(POSITIONS, scene.position))
        wrong["wrong size"] = replace(scene, things=(replace(first, size=other(SIZES, first.size)),))
    else:
        a, b = scene.things
        wrong["swapped colours"] = replace(scene, things=(replace(a, colour=b.colour), replace(b, colour=a.colour)))
        wrong["swapped shapes"] = replace(scene, things=(replace(a, shape=b.shape), replace(b, shape=a.shape)))
        wrong["reversed relation"] = replace(scene, relation=REVERSED[scene.relation])
        wrong["wrong relation"] = replace(scene, relation=other(RELATIONS, scene.relation, REVERSED[scene.relation]))
        wrong["wrong second shape"] = replace(scene, things=(a, replace(b, shape=other(SHAPES, b.shape))))
    right = caption(scene, wording)
    captions = {name: caption(scene, wording) for name, scene in wrong.items()}
    return {name: text for name, text in captions.items() if text != right}


class ShapesPairs:
    """The pair dataset of the shapes world: `ds[i]` is {"image": uint8 [3, H, W], "caption": str}."""

    def __init__(self, split: str = "train", size: int = 100_000, seed: int = 0, resolution: Resolution = 64) -> None:
        check_split(split)
        if size < 1:
            raise ValueError(f"data.pairs.size={size} must be at least 1")
        sides(resolution)
        self.split, self.size, self.seed, self.resolution = split, size, seed, resolution

    @property
    def fingerprint(self) -> str:
        return f"shapes-2/{self.split}/{self.size}/{self.seed}/{self.resolution}"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        scene, wording = self.scene(index)
        return {"image": self.images([index])[0], "caption": caption(scene, wording)}

    def caption(self, index: int) -> str:
        """The caption alone, without drawing the image."""
        return caption(*self.scene(index))

    def scene(self, index: int) -> tuple[Scene, Wording]:
        """What item `index` shows and how its caption words it."""
        if not 0 <= index < self.size:
            raise IndexError(f"shapes scene {index} of {self.size}")
        return scene_at(self.split, self.seed, index)

    def images(self, indices: Iterable[int]) -> torch.Tensor:
        """uint8 [len(indices), 3, H, W], drawn together: far faster than one by one."""
        return render_scenes([self.scene(index)[0] for index in indices], self.resolution)


MOST_PROMPTS = 1_000_000


def shapes_prompts(split: str = "heldout", n: int = 64, seed: int = 0) -> PromptSet:
    """The fully worded captions of `n` scenes of a split, for scoring."""
    if not 1 <= n <= MOST_PROMPTS:
        raise ValueError(f"data.prompts.n={n} must lie between 1 and {MOST_PROMPTS:,}")
    prompts = tuple(caption(scene_at(split, seed, index)[0]) for index in range(n))
    return PromptSet(prompts, name=f"shapes-{split}-{n}-seed{seed}")
