"""The removals that lose the least for the milliseconds they save, exactly, where losses and times add up.

Taking blocks by CLIP lost per millisecond is a rule of thumb: its last block may save far more than was missing, where
another set would have met the target at less loss. Which set is the best is a 0-1 program, which HiGHS solves in
milliseconds (scipy.optimize.milp).
"""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from slimstep.models.architecture import nested
from slimstep.prune.evolve import Action, BlockValue, priced, take_in_order
from slimstep.prune.search import Situation

TIE = 1e-6  # CLIP of a removal: of sets that lose the same, the one with fewer blocks


class AdditiveProgram:
    """The set of removals with the smallest sum of CLIP lost whose milliseconds meet the round's target.

    A removal that loses less than nothing counts as losing nothing; what destroys the picture has its price of
    evolve.py. It removes only: below the target it does nothing. Blocks that were screened out go where all others do
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
    constraints = [LinearConstraint(saved_ms, lb=excess_ms)]
    for i, j in combinations(range(len(values)), 2):
        if nested(values[i].block, values[j].block):
            both = np.zeros(len(values))
            both[[i, j]] = 1
            constraints.append(LinearConstraint(both, ub=1))
    solved = milp(price, integrality=np.ones(len(values)), bounds=Bounds(0, 1), constraints=constraints)
    if solved.x is None:
        return None
    return [value for value, taken in zip(values, solved.x, strict=True) if taken > 0.5]
