"""Ways to choose an architecture round by round: SnapFusion's value, orders and rules of hand, chance, or a table.

A search is a callable `(situation) -> list[Action]`. `needs_scores` says whether the blocks have to be scored for it,
and `named_blocks` what its configuration names, so that a misspelt one is found before anything is trained. What it may
have beside: `needs_similarity` where similarities have to be measured (similarity.py), `takes_interactions` where it
looks at what pairs lose beyond the sum (interactions.py), and `measured_sets`, how many whole sets it has measured.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from slimstep.engine.seeding import generator
from slimstep.models.architecture import WHOLE, Architecture, as_architecture
from slimstep.prune.changes import changes_in
from slimstep.prune.evolve import (
    Action,
    BlockValue,
    apply,
    choose_copies,
    choose_removals,
    copy,
    round_target_ms,
    saving,
    take_in_order,
)
from slimstep.prune.interactions import Interaction


@dataclass(frozen=True)
class Situation:
    """What a search knows when a round has to be decided; `values` are in order of execution, and `similarities` there
    where the search needs them.

    interactions: of pairs of changes, where they were measured. taken: the labels of what the round has removed and
    narrowed already. measure: what whole sets of changes lose by images, taken ones included (sets.py); None where
    none are drawn.
    """

    values: tuple[BlockValue, ...]
    architecture: Architecture
    latency_ms: float
    target_ms: float
    copyable: tuple[str, ...]
    round_index: int
    rounds: int
    similarities: Mapping[str, float | None] = field(default_factory=dict)
    interactions: tuple[Interaction, ...] = ()
    taken: tuple[str, ...] = ()
    measure: Callable[[tuple[str, ...]], BlockValue] | None = None

    @property
    def goal_ms(self) -> float:
        """This round's share of the way to the target."""
        return round_target_ms(self.latency_ms, self.target_ms, self.round_index, self.rounds)

    def after(self, actions: Sequence[Action], measured_ms: float) -> "Situation":
        """The same round once `actions` are taken and the result has been measured."""
        done = [action.change for action in actions]
        left = tuple(v for v in self.values if not any(v.change.excludes(change) for change in done))
        labels = [action.change.label for action in actions if action.action != "copy"]
        open_pairs = (of.without(labels) for of in self.interactions)
        now = replace(self, values=left, architecture=apply(self.architecture, actions), latency_ms=measured_ms)
        interactions = tuple(of for of in open_pairs if of.labels)
        taken = (*self.taken, *labels)
        return replace(now, round_index=self.rounds - 1, interactions=interactions, taken=taken)


class SnapFusionSearch:
    """Algorithm 1: over the target remove what loses the least CLIP score per millisecond, under it copy the dearest.

    `group_size` is the number of actions per round; null lets every round take an equal share of the excess.
    """

    needs_scores, named_blocks = True, ()

    def __init__(self, group_size: int | None = None):
        if group_size is not None and group_size < 1:
            raise ValueError(f"search.method.group_size={group_size} must be at least 1, or null")
        self.group_size = group_size

    def __call__(self, situation: Situation) -> list[Action]:
        now = situation.latency_ms, situation.target_ms
        if situation.latency_ms <= situation.target_ms:
            return choose_copies(situation.values, *now, situation.copyable, self.group_size or 1)
        last = situation.round_index == situation.rounds - 1
        if self.group_size and not last:
            return choose_removals(situation.values, *now, self.group_size)
        return choose_removals(situation.values, situation.latency_ms, situation.goal_ms)


class InOrder:
    """Removes `blocks` in the order given until the target is met: a hand-picked rule cut to any latency."""

    needs_scores = False

    def __init__(self, blocks: Sequence[str]):
        self.named_blocks = tuple(blocks)

    def __call__(self, situation: Situation) -> list[Action]:
        values = {value.block: value for value in situation.values}
        ordered = [values[block] for block in self.named_blocks if block in values]
        return take_in_order(ordered, situation.latency_ms, situation.goal_ms)


class RandomRemoval:
    """Removes blocks in a random order, drawn from `seed`, until the target is met: the baseline of every ranking."""

    needs_scores, named_blocks = False, ()

    def __init__(self, seed: int = 0):
        self.seed = seed

    def __call__(self, situation: Situation) -> list[Action]:
        draw = generator("random removal", self.seed, situation.round_index)
        order = torch.randperm(len(situation.values), generator=draw).tolist()
        return take_in_order([situation.values[i] for i in order], situation.latency_ms, situation.goal_ms)


class MostSimilar:
    """Removes the blocks that change their input least until the target is met (SANA-1.5, FLUX.1-lite).

    Blocks whose output has another shape, as ResNets that change the channels, go last.
    """

    needs_scores, needs_similarity, named_blocks = False, True, ()

    def __call__(self, situation: Situation) -> list[Action]:
        known = {block: value for block, value in situation.similarities.items() if value is not None}
        ordered = sorted(situation.values, key=lambda value: -known.get(value.block, -math.inf))
        return take_in_order(ordered, situation.latency_ms, situation.goal_ms)


class MiddleRow:
    """Removes blocks from the middle of the network outwards until the target is met: a row of neighbours, the rule of
    those who hold that the first and the last layers matter most."""

    needs_scores, named_blocks = False, ()

    def __call__(self, situation: Situation) -> list[Action]:
        values = situation.values
        ordered = sorted(range(len(values)), key=lambda i: abs(2 * i - len(values) + 1))
        return take_in_order([values[i] for i in ordered], situation.latency_ms, situation.goal_ms)


class EverySecond:
    """Removes every second block until the target is met, so that no two neighbours go before half of all are gone.

    However many go, they lie evenly over the depth.
    """

    needs_scores, named_blocks = False, ()

    def __call__(self, situation: Situation) -> list[Action]:
        ordered = [value for half in (situation.values[1::2], situation.values[::2]) for value in spread(half)]
        return take_in_order(ordered, situation.latency_ms, situation.goal_ms)


def spread(values: Sequence[BlockValue]) -> list[BlockValue]:
    """The values in an order whose every beginning is spread evenly over all of them: van der Corput's."""
    digits = len(values).bit_length()
    points = (int(f"{k:0{digits}b}"[::-1], 2) / 2**digits for k in range(2**digits))
    return [values[i] for i in dict.fromkeys(int(point * len(values)) for point in points)] if values else []


class Manual:
    """An architecture given by hand: `remove` lists blocks, `architecture` is a table {block: repeats}, or its file; a
    block that is changed otherwise stands in it as {block: {widths: {part: share}, dtype: int8, merge: share}}.

    The latency target is not looked at. Raises FileNotFoundError where `architecture` names a file that does not exist,
    and ValueError where it is no such table.
    """

    needs_scores = False

    def __init__(self, remove: Sequence[str] = (), architecture: Mapping[str, Any] | str | None = None):
        self.skip_rule = None  # what the file's architecture was decided with, where it tells
        if isinstance(architecture, str):
            architecture, self.skip_rule = read_architecture(Path(architecture))
        remove = [remove] if isinstance(remove, str) else remove
        try:
            self.architecture = as_architecture({**dict(architecture or {}), **dict.fromkeys(remove, 0)})
        except ValueError as error:
            raise ValueError(f"search.method.architecture: {error}") from error
        self.named_blocks = tuple(self.architecture)

    def __call__(self, situation: Situation) -> list[Action]:
        known = {value.block: value for value in situation.values}
        actions, latency_ms = [], situation.latency_ms
        for block, spec in self.architecture.items():
            # A level as a whole has no value of its own, nor has a part.
            unknown = BlockValue(block, math.nan, math.nan, math.nan)
            now, value = situation.architecture.get(block, WHOLE), known.get(block, unknown)
            present = {change.part: change.share for change in changes_in(block, now)}
            parts = [replace(unknown, part=change.part, share=change.share) for change in changes_in(block, spec)
                     if present.get(change.part, 1) != change.share]  # fmt: skip
            missing = [copy] * (spec.repeats - now.repeats) if spec.repeats else [saving] * (now.repeats > 0)
            for change, of in [*((saving, part) for part in parts), *((change, value) for change in missing)]:
                actions.append(change(of, latency_ms))
                latency_ms = actions[-1].predicted_ms
        return actions


def needs_similarity(search: Any) -> bool:
    return getattr(search, "needs_similarity", False)


def takes_interactions(search: Any) -> bool:
    return getattr(search, "takes_interactions", False)


def measured_sets(search: Any) -> int:
    """How many whole sets of changes the search has measured by images in a round, at most."""
    return getattr(search, "measured_sets", 0)


def ranks_by_prompts(search: Any) -> bool:
    """Whether the search looks at images of the calibration prompts, which nothing is evaluated on then."""
    return search.needs_scores or needs_similarity(search)


def read_architecture(path: Path) -> tuple[dict[str, Any], str | dict[str, str] | None]:
    """The table in a JSON file, and the skip rule it was decided with, which a run's decision.json tells alone."""
    key = f"search.method.architecture={str(path)!r}"
    if not path.is_file():
        raise FileNotFoundError(f"{key} does not exist; give a JSON file {{block: repeats}}")
    try:
        record = json.loads(path.read_text())
        decided = "after" in record
        return dict(record["after"] if decided else record), record.get("bypass") if decided else None
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{key} is no JSON table {{block: repeats}}: {error}") from error
