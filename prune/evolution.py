"""Sets of changes, bred by what they are predicted to lose, and chosen by what the best of them are measured to lose.

The integer program finds the best set where losses add up. Where they do not, images with each of a few good and
different sets tell which is the best, and an evolutionary search gives such sets. Fitness is the sum of prices
(evolve.py) with what pairs lose beyond it (interactions.py). Every `measure_every` generations the best `finalists` are
measured (sets.py), and what they lose beyond their prediction is shared out among their pairs by ridge regression, so
that what follows is bred by what has been seen.

Axes: S measured sets.
"""

import math
import random
from collections.abc import Iterable, Sequence

import numpy as np

from slimstep.engine.seeding import seed_of
from slimstep.prune.evolve import Action, BlockValue, choose_removals, priced, take_in_order
from slimstep.prune.interactions import Interaction, beyond_sum
from slimstep.prune.program import TIE, cheapest_cover, program_copies, program_removals
from slimstep.prune.search import Situation

Genome = frozenset[int]  # the numbers of the changes of a set

ALIKE = 0.8  # of the changes of two sets, in both: such a set is not measured beside the other while there are others


class Pool:
    """The changes that a set may have, and what sets of them are predicted to lose."""

    def __init__(
        self, values: Iterable[BlockValue], excess_ms: float, interactions: Iterable[Interaction] = ()
    ) -> None:
        usable = [value for value in priced(values) if value.saved_ms > 0]
        self.values = [value for value in usable if not math.isnan(value.delta_clip)]
        self.excess_ms, self.interactions = excess_ms, tuple(interactions)
        self.prices = [max(value.price, 0.0) for value in self.values]
        self.weights: dict[Genome, float] = {}
        changes = [value.change for value in self.values]
        self.excluded = [{m for m, other in enumerate(changes) if m != n and change.excludes(other)}
                         for n, change in enumerate(changes)]  # fmt: skip

    def labels(self, genome: Genome) -> tuple[str, ...]:
        return tuple(self.values[n].change.label for n in sorted(genome))

    def saved_ms(self, genome: Iterable[int]) -> float:
        return sum(self.values[n].saved_ms for n in genome)

    def predicted(self, genome: Genome) -> float:
        """What a set loses by the sum and its pairs, not below 0."""
        beyond = beyond_sum(self.interactions, self.labels(genome)) if self.interactions else 0.0
        return max(sum(self.prices[n] for n in genome) + beyond, 0.0)

    def fitness(self, genome: Genome) -> tuple[float, list[int]]:
        """Sorts the best first; of equal ones that with fewer changes, and then the earlier ones."""
        return max(self.predicted(genome) + self.learnt(genome), 0.0) + TIE * len(genome), sorted(genome)

    def learn(self, measured: dict[Genome, float]) -> None:
        """Ridge regression, with a penalty of 1, of what sets lose beyond their prediction on their pairs."""
        beyond_S = np.array([lost - self.predicted(genome) for genome, lost in measured.items()])
        shared_SS = np.array([[math.comb(len(a & b), 2) for b in measured] for a in measured], dtype=float)
        weights = np.linalg.solve(shared_SS + np.eye(len(beyond_S)), beyond_S)
        self.weights = dict(zip(measured, weights.tolist(), strict=True))

    def learnt(self, genome: Genome) -> float:
        return sum(weight * math.comb(len(genome & other), 2) for other, weight in self.weights.items())

    def made_feasible(self, genes: Iterable[int], draw: random.Random) -> Genome | None:
        """A set with no two changes that exclude one another, that saves enough and has nothing to spare: changes are
        added, each the better bargain of two drawn, and then the dearest dropped that are not needed and spare the
        others nothing; None where it does not come to enough."""
        genome: set[int] = set()
        for n in draw.sample(sorted(genes), len(set(genes))):
            if not genome & self.excluded[n]:
                genome.add(n)
        while self.saved_ms(genome) < self.excess_ms:
            rest = [n for n in range(len(self.values)) if n not in genome and not genome & self.excluded[n]]
            if not rest:
                return None
            genome.add(min(draw.choices(rest, k=2), key=lambda n: self.values[n].removal_order))
        for n in sorted(genome, key=lambda n: (-self.prices[n], n)):
            less = frozenset(genome - {n})
            if self.saved_ms(less) >= self.excess_ms and self.predicted(less) <= self.predicted(frozenset(genome)):
                genome.remove(n)
        return frozenset(genome)

    def child(self, parents: tuple[Genome, Genome], mutation: float, draw: random.Random) -> Genome | None:
        """What both parents have, and half of what one has; each change is dropped with probability `mutation`, and
        with the same probability another is added."""
        one, other = parents
        genes = {n for n in sorted(one | other) if n in one & other or draw.random() < 0.5}
        genes = {n for n in sorted(genes) if draw.random() >= mutation}
        if draw.random() < mutation:
            genes.add(draw.randrange(len(self.values)))
        return self.made_feasible(genes, draw)


def evolved(pool: Pool, population: Sequence[Genome], size: int, mutation: float, draw: random.Random) -> list[Genome]:
    """The next generation, the best first: the `size` best of all parents and as many children, no set twice. Each
    parent is the better of two drawn."""
    place = {genome: n for n, genome in enumerate(population)}

    def parent() -> Genome:
        return min(draw.choices(population, k=2), key=place.__getitem__)

    children = (pool.child((parent(), parent()), mutation, draw) for _ in range(size))
    every = dict.fromkeys([*population, *(child for child in children if child is not None)])
    return sorted(every, key=pool.fitness)[:size]


def first_population(pool: Pool, start: Iterable[Genome], size: int, draw: random.Random) -> list[Genome]:
    """Random sets that save enough, and those of `start`."""
    made = (pool.made_feasible(draw.sample(range(len(pool.values)), draw.randint(0, len(pool.values) // 2)), draw)
            for _ in range(size))  # fmt: skip
    every = dict.fromkeys([*start, *(genome for genome in made if genome is not None)])
    return sorted(every, key=pool.fitness)[:size]


def next_finalists(population: Sequence[Genome], measured: Iterable[Genome], count: int) -> list[Genome]:
    """The first of a sorted population that were not measured: those unlike the measured ones and each other, and the
    rest where these are too few."""
    seen, chosen = set(measured), list[Genome]()
    for is_picky in (True, False):
        for genome in population:
            others = seen.union(chosen)
            alike = any(len(genome & other) >= ALIKE * len(genome | other) for other in others)
            if len(chosen) < count and genome not in others and not (is_picky and alike):
                chosen.append(genome)
    return chosen


class EvolutionarySearch:
    """Sets of removals and narrowings that meet the round's target, bred for a small loss; the one is taken that loses
    the least by images with all its changes, of those that were measured.

    population: how many sets there are in a generation; the set of the integer program and that of Algorithm 1 are in
    the first. generations: how many there are. mutation: the probability that a child drops a change, and that it takes
    up another. finalists: how many sets are measured on all calibration prompts each time, the best that are unlike
    those measured before; measure_every: after how many generations that is, and after the last. seed: of all draws.

    Below the target it copies as the integer program does. Where nothing can be measured, in a race and for other
    budgets of a finished run, the best prediction is the answer, which is the program's.
    """

    needs_scores, named_blocks, takes_interactions = True, (), True

    def __init__(
        self, population: int = 64, generations: int = 60, mutation: float = 0.1, finalists: int = 4,
        measure_every: int = 20, seed: int = 0,
    ):  # fmt: skip
        own = {"population": population, "generations": generations, "finalists": finalists,
               "measure_every": measure_every}  # fmt: skip
        for name, value in own.items():
            least = 2 if name == "population" else 1
            if value < least:
                raise ValueError(f"search.method.{name}={value} must be at least {least}")
        if not 0 < mutation < 1:
            raise ValueError(f"search.method.mutation={mutation} must lie between 0 and 1")
        if finalists > population:
            raise ValueError(f"search.method.finalists={finalists} is more than search.method.population={population}")
        self.population, self.generations, self.mutation = population, generations, mutation
        self.finalists, self.measure_every, self.seed = finalists, measure_every, seed

    @property
    def measured_sets(self) -> int:
        return self.finalists * math.ceil(self.generations / self.measure_every)

    def __call__(self, situation: Situation) -> list[Action]:
        values, now = situation.values, (situation.latency_ms, situation.goal_ms)
        if situation.latency_ms <= situation.goal_ms:
            return program_copies(values, *now, situation.copyable)
        exact = program_removals(values, *now, situation.interactions)
        pool = Pool(values, now[0] - now[1], situation.interactions)
        is_met = cheapest_cover(pool.values, pool.excess_ms) is not None
        if situation.measure is None or not is_met:
            return exact
        number = {value.change.label: n for n, value in enumerate(pool.values)}
        known = [exact, choose_removals(values, *now)]
        start = [frozenset(number[action.change.label] for action in actions) for actions in known
                 if all(action.change.label in number for action in actions)]  # fmt: skip
        start = [genome for genome in start if pool.saved_ms(genome) >= pool.excess_ms]
        best = self.best_measured(pool, start, situation)
        ordered = sorted((pool.values[n] for n in best), key=lambda value: value.removal_order)
        return take_in_order(ordered, *now)

    def best_measured(self, pool: Pool, start: Sequence[Genome], situation: Situation) -> Genome:
        """The set that loses the least by images, of all that were measured."""
        assert situation.measure is not None, "a search that measures needs something to measure with"
        draw = random.Random(seed_of("evolution", self.seed, situation.round_index, *sorted(situation.taken)))
        population = first_population(pool, start, self.population, draw)
        before = situation.measure(situation.taken).delta_clip if situation.taken else 0.0
        found: dict[Genome, BlockValue] = {}
        for generation in range(1, self.generations + 1):
            population = evolved(pool, population, self.population, self.mutation, draw)
            if generation % self.measure_every and generation < self.generations:
                continue
            for genome in next_finalists(population, found, self.finalists):
                found[genome] = situation.measure((*situation.taken, *pool.labels(genome)))
            prices = [value.price for value in priced(found.values())]
            lost = dict(zip(found, prices, strict=True))
            pool.learn({genome: price - before for genome, price in lost.items()})
            population = sorted(population, key=pool.fitness)
        return min(lost, key=lambda genome: (lost[genome], pool.fitness(genome)))
