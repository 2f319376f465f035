"""The changes that lose the least for the milliseconds they save, exactly, where losses and times add up.

Taking blocks by CLIP lost per millisecond is a rule of thumb: its last block may save far more than was missing, where
another set would have met the target at less loss. Which set is the best is a 0-1 program, which HiGHS solves in
milliseconds (scipy.optimize.milp).
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from slimstep.models.architecture import holds
from slimstep.prune.changes import Change
from slimstep.prune.evolve import Action, BlockValue, priced, take_in_order
from slimstep.prune.search import Situation

TIE = 1e-3  # CLIP of a change, below what can be measured: of sets that lose the same, the one with fewer changes


class AdditiveProgram:
    """The set of changes (changes.py) with the smallest sum of CLIP lost whose milliseconds meet the round's target.

    A change that loses less than nothing counts as losing nothing; what destroys the picture has its price of
    evolve.py. It copies nothing: below the target it does nothing. What was screened out is taken where all else does
    not suffice.
    """

    needs_scores, named_blocks = True, ()

    def __call__(self, situation: Situation) -> list[Action]:
        if situation.latency_ms <= situation.goal_ms:
            return []
        return program_removals(situation.values, situation.latency_ms, situation.goal_ms)


def program_removals(values: Iterable[BlockValue], latency_ms: float, target_ms: float) -> list[Action]:
    """As evolve.choose_removals, but the cheapest set; all that save time where even these do not suffice."""
    usable = [value for value in priced(values) if value.saved_ms > 0]
    scored = [value for value in usable if not math.isnan(value.delta_clip)]
    chosen = cheapest_cover(scored, latency_ms - target_ms)
    if chosen is None:
        chosen = sorted(usable, key=lambda value: value.removal_order)
    return take_in_order(sorted(chosen, key=lambda value: value.removal_order), latency_ms, target_ms)


def cheapest_cover(values: Sequence[BlockValue], excess_ms: float) -> list[BlockValue] | None:
    """Those of the values with the smallest sum of prices that save at least `excess_ms`, none within another; None
    where no such set does."""
    if not values:
        return None
    price = np.array([max(value.price, 0.0) + TIE for value in values])
    saved_ms = np.array([value.saved_ms for value in values])
    constraints = [LinearConstraint(saved_ms, lb=excess_ms), LinearConstraint(at_most_one(values), ub=1)]
    solved = milp(price, integrality=np.ones(len(values)), bounds=Bounds(0, 1), constraints=constraints)
    if solved.x is None:
        return None
    return [value for value, taken in zip(values, solved.x, strict=True) if taken > 0.5]


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
