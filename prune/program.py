"""The changes that lose the least for the milliseconds they save, exactly, where losses and times add up.

Taking blocks by CLIP lost per millisecond is a rule of thumb: its last block may save far more than was missing, where
another set would have met the target at less loss. Which set is the best is a 0-1 program, which HiGHS solves in
milliseconds (scipy.optimize.milp).
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack

from slimstep.models.architecture import holds
from slimstep.prune.changes import Change
from slimstep.prune.evolve import Action, BlockValue, copy, priced, take_in_order
from slimstep.prune.interactions import Interaction
from slimstep.prune.search import Situation

TIE = 1e-3  # CLIP of a change, below what can be measured: of sets that lose the same, the one with fewer changes


class AdditiveProgram:
    """The set of changes (changes.py) with the smallest sum of CLIP lost whose milliseconds meet the round's target;
    in a round that is below its target, the copies that are worth the most in sum and fit.

    A change that loses less than nothing counts as losing nothing; what destroys the picture has its price of
    evolve.py. What pairs lose beyond the sum is counted where it was measured (interactions.py). What was screened out
    is taken where all else does not suffice.

    Removals and copies are never in one program. A copy is held to gain what its block's removal loses, as in
    Algorithm 1, which nothing has measured: it is a rule for the order of copies, and no price. Where both were in one
    sum, each copy of a block that matters would be paid for with removals of blocks that matter less, also in a
    network that meets its target (tests/prune/test_program.py has the toy).
    """

    needs_scores, named_blocks, takes_interactions = True, (), True

    def __call__(self, situation: Situation) -> list[Action]:
        if situation.latency_ms <= situation.goal_ms:
            return program_copies(situation.values, situation.latency_ms, situation.goal_ms, situation.copyable)
        now = situation.latency_ms, situation.goal_ms
        return program_removals(situation.values, *now, situation.interactions)


def program_removals(
    values: Iterable[BlockValue], latency_ms: float, target_ms: float, interactions: Iterable[Interaction] = ()
) -> list[Action]:
    """As evolve.choose_removals, but the cheapest set; all that save time where even these do not suffice."""
    usable = [value for value in priced(values) if value.saved_ms > 0]
    scored = [value for value in usable if not math.isnan(value.delta_clip)]
    chosen = cheapest_cover(scored, latency_ms - target_ms, interactions)
    if chosen is None:
        chosen = sorted(usable, key=lambda value: value.removal_order)
    return take_in_order(sorted(chosen, key=lambda value: value.removal_order), latency_ms, target_ms)


def cheapest_cover(
    values: Sequence[BlockValue], excess_ms: float, interactions: Iterable[Interaction] = ()
) -> list[BlockValue] | None:
    """Those of the values that lose the least together and save at least `excess_ms`, none within another; None where
    no such set does.

    Variables: x of every value, y of every interaction, which is the product of its x (y ≤ x_i, y ≤ x_j,
    y ≥ x_i + x_j - 1), and the loss of the set, which is not below 0.
    """
    if not values:
        return None
    column = {value.change.label: n for n, value in enumerate(values)}
    known = [of for of in interactions if column.keys() >= set(of.labels)]
    x, y, width = len(values), len(known), len(values) + len(known) + 1
    price = [max(value.price, 0.0) for value in values] + [of.lost for of in known]
    saved_ms = np.array([value.saved_ms for value in values])
    apart = hstack([at_most_one(values), csr_array((at_most_one(values).shape[0], y + 1))])
    constraints = [
        LinearConstraint(np.append(saved_ms, np.zeros(y + 1))[None], lb=excess_ms),
        LinearConstraint(apart, ub=1),
        LinearConstraint(np.append(price, -1.0)[None], ub=0),
    ]
    for k, of in enumerate(known):
        product_W = np.zeros(width)
        product_W[x + k] = 1.0
        for label in of.labels:
            below_W = product_W.copy()
            below_W[column[label]] = -1.0
            constraints.append(LinearConstraint(below_W[None], ub=0))
        product_W[[column[label] for label in of.labels]] = -1.0
        constraints.append(LinearConstraint(product_W[None], lb=1 - len(of.labels)))
    whole = np.concatenate([np.ones(x), np.zeros(y + 1)])
    bounds = Bounds(np.zeros(width), np.append(np.ones(x + y), np.inf))
    solved = milp(TIE * whole + np.eye(width)[-1], integrality=whole, bounds=bounds, constraints=constraints)
    if solved.x is None:
        return None
    return [value for value, taken in zip(values, solved.x[:x], strict=True) if taken > 0.5]


def program_copies(
    values: Iterable[BlockValue], latency_ms: float, target_ms: float, copyable: Iterable[str]
) -> list[Action]:
    """As evolve.choose_copies, but those that are worth the most in sum: one copy of a block at most, and none of a
    block that loses nothing when it is removed. None without a target."""
    copyable, room_ms = set(copyable), target_ms - latency_ms
    usable = [value for value in values if value.part is None and value.block in copyable]
    usable = [value for value in usable if value.delta_clip > 0 and 0 < value.copy_ms <= room_ms]
    if not usable or math.isinf(room_ms):
        return []
    worth = np.array([value.delta_clip for value in usable])
    copy_ms = np.array([value.copy_ms for value in usable])
    constraints = [LinearConstraint(copy_ms, ub=room_ms), LinearConstraint(at_most_one(usable), ub=1)]
    solved = milp(-worth, integrality=np.ones(len(usable)), bounds=Bounds(0, 1), constraints=constraints)
    chosen = [value for value, taken in zip(usable, solved.x, strict=True) if taken > 0.5]
    actions: list[Action] = []
    for value in sorted(chosen, key=lambda value: -value.clip_per_ms):
        actions.append(copy(value, latency_ms))
        latency_ms = actions[-1].predicted_ms
    return actions


def at_most_one(values: Sequence[BlockValue]) -> csr_array:
    """Rows of values that exclude one another, one for each part of a block: its changes, those of the whole block, and
    the removals of the blocks that hold it. Float64 [parts, values]."""
    parts = {(value.block, value.change.place) for value in values}
    rows = [[in_row(value.change, block, part) for value in values] for block, part in sorted(parts, key=str)]
    return csr_array(np.array(rows, dtype=float))


def in_row(change: Change, block: str, part: str | None) -> bool:
    if change.block == block:
        return change.place in (None, part)
    return change.part is None and holds(change.block, block)
