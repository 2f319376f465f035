"""A scene of the shapes data: what is to be seen, and where."""

from dataclasses import dataclass

REVERSED = {"above": "below", "left of": "right of", "inside": "around"}
REVERSED |= {after: before for before, after in REVERSED.items()}


@dataclass(frozen=True)
class Thing:
    """One kind of object; a scene may show it several times."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """What is to be seen (kind, things, count, relation, position, background, frame) and where (centres, radii).

    `centres` and `radii` are fractions of the width, one per drawn object, painted in order. `background` holds one
    colour, or two: left half and right half.
    """

    kind: str
    things: tuple[Thing, ...]
    background: tuple[str, ...]
    centres: tuple[tuple[float, float], ...]
    radii: tuple[float, ...]
    count: int = 1
    relation: str = ""
    position: str = ""
    frame: str = ""

    @property
    def objects(self) -> tuple[Thing, ...]:
        """The drawn objects, aligned with `centres`; the outer of two nested things is painted first."""
        if self.kind == "count":
            return self.things * self.count
        return self.things[::-1] if self.relation == "inside" else self.things

    def combination(self) -> tuple:
        """The attributes by which scenes are held out: the same for `a above b` and `b below a`."""
        things, relation = self.things, self.relation
        if relation in ("below", "right of", "around"):
            things, relation = things[::-1], REVERSED[relation]
        return self.kind, things, self.count, relation, self.position
