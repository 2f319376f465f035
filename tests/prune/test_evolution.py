"""Evolutionary search: it finds the best set, stays within the budget, measures what it chooses, and repeats itself."""

import itertools
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.metric import as_metric
from slimstep.eval.sampling import Sampler
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.prune.changed import narrower_labels
from slimstep.prune.changes import Change
from slimstep.prune.evolution import EvolutionarySearch, Pool, evolved, first_population, next_finalists
from slimstep.prune.evolve import BlockValue
from slimstep.prune.interactions import Interaction
from slimstep.prune.program import program_removals
from slimstep.prune.scores import Drawing
from slimstep.prune.screening import screen_blocks
from slimstep.prune.search import Situation
from tests.prune.test_changes import value
from tests.prune.test_job import SMALL, run
from tests.prune.test_similarity import KINDS, PROMPTS, made
from tests.test_processes import launch
from tests.tiny import small_unet

LABELS = ["a", "a:ff@0.5", "a:attn@0.5", "b", "b.0", "b.0:ff@0.5", "c", "d", "e", "f"]


def toy(seed):
    draw = random.Random(seed)
    values = tuple(value(label, draw.uniform(-0.5, 5), draw.uniform(0.2, 3)) for label in LABELS)
    pairs = [Interaction(pair, draw.uniform(-1, 6)) for pair in draw.sample([*itertools.combinations(LABELS, 2)], 8)]
    return values, draw.uniform(1, 7), tuple(pairs)


def best_by_enumeration(pool):
    """What the best of all sets loses that save enough."""
    numbers = range(len(pool.values))
    sets = map(frozenset, itertools.chain.from_iterable(itertools.combinations(numbers, k) for k in range(1, 11)))
    apart = (genome for genome in sets if not any(genome & pool.excluded[n] for n in genome))
    return min((pool.predicted(genome) for genome in apart if pool.saved_ms(genome) >= pool.excess_ms), default=None)


@pytest.mark.parametrize("seed", range(10))
def test_without_a_start_it_breeds_the_set_that_enumeration_finds(seed):
    values, excess_ms, pairs = toy(seed)
    pool, draw = Pool(values, excess_ms, pairs), random.Random(seed)
    population = first_population(pool, [], 48, draw)
    for _ in range(40):
        population = evolved(pool, population, 48, 0.15, draw)
        assert len(set(population)) == len(population) <= 48
        for genome in population:
            assert pool.saved_ms(genome) >= excess_ms and not any(genome & pool.excluded[n] for n in genome)
    assert pool.predicted(population[0]) == pytest.approx(best_by_enumeration(pool), abs=0.02)


def situation(values, excess_ms, pairs=(), **more):
    now = {"architecture": {}, "latency_ms": 20.0, "target_ms": 20.0 - excess_ms, "copyable": ("c",)}
    return Situation(values, **now, round_index=0, rounds=1, interactions=pairs, **more)


def labels(actions):
    return {action.change.label for action in actions}


class Measuring:
    """Images of a world in which losses add up, except for pairs that no search is told of."""

    def __init__(self, values, hidden):
        self.lost, self.hidden, self.asked = {v.change.label: v.delta_clip for v in values}, hidden, []

    def __call__(self, taken):
        self.asked.append(frozenset(taken))
        beyond = sum(of.lost for of in self.hidden if set(of.labels) <= set(taken))
        return BlockValue("set", sum(self.lost[label] for label in taken) + beyond, 0.1, 0.0)


def test_what_is_measured_decides_and_what_was_seen_is_learnt():
    """The cheapest sum has both of two blocks that are harmless alone; images show what they lose together."""
    alone = {"a": 0.1, "b": 0.1, "c": 0.5, "d": 1, "e": 2, "f": 3, "g": 4, "h": 5}
    values = tuple(value(label, lost, 1.0) for label, lost in alone.items())
    measure = Measuring(values, [Interaction(("a", "b"), 40.0)])
    now = situation(values, 3.0, measure=measure)
    assert labels(program_removals(values, 20.0, 17.0)) == {"a", "b", "c"}
    search = EvolutionarySearch(population=24, generations=20, finalists=4, measure_every=4)
    actions = search(now)
    assert labels(actions) in ({"a", "c", "d"}, {"b", "c", "d"})
    assert frozenset("abc") in measure.asked and len(measure.asked) == search.measured_sets == 20
    assert len(set(measure.asked)) == 20 and actions[-1].predicted_ms <= 17.0


def test_it_repeats_itself_by_its_seed():
    draw = random.Random(0)
    values = tuple(value(f"block.{n}", draw.uniform(0, 5), draw.uniform(0.5, 2)) for n in range(30))
    found = []
    for seed in (0, 0, 1):
        measure = Measuring(values, [Interaction(("block.1", "block.2"), 9.0)])
        search = EvolutionarySearch(seed=seed, generations=6, measure_every=2)
        found.append((labels(search(situation(values, 12.0, measure=measure))), measure.asked))
    assert found[0] == found[1] and found[0][1] != found[2][1]


def test_without_images_it_is_the_program_and_below_the_target_it_copies():
    values, excess_ms, pairs = toy(5)
    now = situation(values, excess_ms, pairs)
    exact = program_removals(values, now.latency_ms, now.target_ms, pairs)
    assert EvolutionarySearch()(now) == exact
    room = replace(now, target_ms=30.0, measure=Measuring(values, ()))
    assert [(action.action, action.block) for action in EvolutionarySearch()(room)] == [("copy", "c")]


def test_a_target_that_nothing_meets_is_approached_as_far_as_it_can_be():
    values, _, _ = toy(1)
    measure = Measuring(values, ())
    now = situation(values, 19.0, measure=measure)
    assert EvolutionarySearch()(now) == program_removals(values, now.latency_ms, now.target_ms) and not measure.asked


def test_a_round_that_goes_on_measures_with_what_it_took():
    values = tuple(value(label, lost, 1.0) for label, lost in zip("abcd", [0.1, 0.2, 0.3, 0.4], strict=True))
    measure = Measuring(values, [Interaction(("a", "b"), 9.0)])
    now = situation(values, 1.0, [Interaction(("a", "c"), 2.0)], measure=measure)
    search = EvolutionarySearch(population=8, generations=8, finalists=4, measure_every=4)
    first = search(now)
    assert labels(first) == {"a"}
    then = replace(now, latency_ms=19.0).after(first, 19.5)
    assert then.taken == ("a",) and then.interactions == (Interaction(("c",), 2.0),)
    measure.asked.clear()
    assert labels(search(then)) == {"c"}  # not b, which the images refuse beside a; c loses 0.3 by images
    assert all("a" in asked for asked in measure.asked)


def test_finalists_are_unlike_each_other_while_there_are_such():
    near = [frozenset(range(10)) - {n} for n in range(4)]
    far = frozenset(range(20, 26))
    assert next_finalists([*near, far], [], 2) == [near[0], far]
    assert next_finalists([*near, far], [near[0]], 3) == [far, near[1], near[2]]


def test_wrong_settings_are_named():
    for own, message in (
        ({"population": 1}, "population=1 must be at least 2"),
        ({"mutation": 1.0}, "mutation=1.0 must lie between"),
        ({"finalists": 0}, "finalists=0 must be at least 1"),
        ({"finalists": 9, "population": 8}, "finalists=9 is more than search.method.population=8"),
    ):
        with pytest.raises(ValueError, match=rf"search\.method\.{message}"):
            EvolutionarySearch(**own)


# ---- sets by masks ----


@pytest.mark.parametrize("kind", KINDS)
def test_several_changes_at_once_are_those_of_surgery(kind, tiny_clip_folder):
    pipeline, network, block = made(kind)
    sampler, scorer = Sampler(pipeline, 2, 2.0), ClipScorer(f"local-dir:{tiny_clip_folder}")
    narrower = narrower_labels(network, (0.5,))
    parts = {label.partition("@")[0]: label for label in narrower}.values()
    (one, other), removed = [label for label in parts if not label.startswith(block)][-2:], network.kept_blocks[:2]
    apart = [label for label in removed if not any(Change.of(label).excludes(Change.of(x)) for x in (one, other))]
    sets = [(one, other, *apart), (block,), (block, *apart), (), (one, block)]
    drawing = Drawing(network, sampler, as_metric(scorer), PROMPTS, 4, Accelerator(cpu=True))
    base_P = drawing.base(range(3))
    lost = drawing.changes([(labels, index) for labels in sets for index in range(3)])[:, 0].view(len(sets), 3)
    screen = screen_blocks(network, sampler, PROMPTS, 4, Accelerator(cpu=True), changes=sets)
    for n, some in enumerate(sets):
        architecture = {}
        for label in some:
            architecture = Change.of(label).applied_to(architecture)
        images = sampler.images(network.with_architecture(architecture), PROMPTS.prompts, range(3))
        without_P = scorer.score(images, scorer.text(PROMPTS.prompts))
        torch.testing.assert_close(lost[n], base_P - without_P, atol=0.05, rtol=0)
        assert (screen.errors[some] > 1e-6) == bool(some)
    after = sampler.images(network, PROMPTS.prompts, range(3))
    assert torch.equal(after, drawing.images_of(range(3)))  # the weights are what they were


# ---- the job ----

SEARCH = ["search=evolution", "search.rounds=1", "search.target_fraction=0.8", "search.actions=[remove,narrow]",
          "search.widths=[0.5]", "search.method.population=16", "search.method.generations=4",
          "search.method.finalists=2", "search.method.measure_every=2", "search.interactions=12"]  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_model):
    """With a table of known times: what is measured twice is not the same."""
    root = tmp_path_factory.mktemp("evolved")
    unet = PrunableUNet2DConditionModel.from_unet(small_unet())
    draw = random.Random(0)
    ms = {block: draw.uniform(1, 3) for block in unet.blocks}
    parts = {label: 0.3 * (1 - Change.of(label).share) for label in narrower_labels(unet, (0.5,))}
    entries = {name: {label: {"ms": x} for label, x in times.items()} for name, times in
               (("sites", ms), ("narrower", parts))}  # fmt: skip
    (root / "latency.json").write_text(json.dumps({"full_ms": 2 * sum(ms.values()), **entries}))
    return ["+experiment=prune_unet", f"root={root}", f"latency.table={root / 'latency.json'}", *SEARCH, *tiny_model]


@pytest.fixture(scope="module")
def finished(job):
    done = run(*job)
    assert done.returncode == 0, done.stderr
    return Path(job[1].removeprefix("root=")) / "prune_unet", done.stderr


def test_the_job_takes_the_finalist_that_was_measured_to_lose_the_least(finished):
    path, said = finished
    decision = json.loads((path / "round-00/decision.json").read_text())
    finalists = decision["finalists"]
    assert len(finalists) == 4 and "together lose" in said
    assert decision["measured_ms"] == pytest.approx(decision["predicted_ms"])
    assert decision["measured_ms"] <= decision["target_ms"]
    assert all(of["predicted_ms"] <= decision["target_ms"] for of in finalists)
    taken = [of for of in finalists if of["taken"]]
    assert len(taken) == 1
    changes = sorted(Change(a["site"], a.get("part"), a.get("share", 0.0)).label for a in decision["actions"])
    assert taken[0]["changes"] == changes and taken[0]["predicted_ms"] == pytest.approx(decision["predicted_ms"])
    files = [json.loads(file.read_text()) for file in (path / "round-00/sets").glob("*.json")]
    measured = {tuple(file["changes"]): file["delta_clip"] for file in files}
    assert all(measured[tuple(of["changes"])] == of["measured"] for of in finalists)
    page = (path / "report.html").read_text()
    assert "Sets that were measured" in page and "Pairs that lose more or less" in page


def test_a_search_killed_between_finalists_ends_the_same(finished, job):
    """The files of two sets are there, and the decision and what follows are not."""
    path, _ = finished
    before = json.loads((path / "round-00/decision.json").read_text())
    files = sorted((path / "round-00/sets").glob("*.json"))
    for file in [*files[2:], path / "round-00/decision.json"]:
        file.unlink()
    for folder in ("evaluation", "evolved", "recovery", "export"):
        for file in sorted((path / folder).rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (path / folder).rmdir()
    kept = [file.stat().st_mtime_ns for file in files[:2]]
    again = run(*job)
    assert again.returncode == 0, again.stderr
    after = json.loads((path / "round-00/decision.json").read_text())
    assert after["finalists"] == before["finalists"] and after["after"] == before["after"]
    assert [file.stat().st_mtime_ns for file in files[:2]] == kept
    assert after["actions"] == before["actions"]


@pytest.mark.slow
def test_two_processes_choose_as_one_does(finished, job, tmp_path):
    path, _ = finished
    (tmp_path / "prune_unet/round-00").mkdir(parents=True)
    shutil.copy(path / "round-00/weights.safetensors", tmp_path / "prune_unet/round-00")  # the same network to score
    two = launch(2, tmp_path, *SMALL, *(override for override in job if not override.startswith("root=")))
    for artifact in ("scores", "interactions", "decision"):
        ours, theirs = (json.loads((run / f"round-00/{artifact}.json").read_text()) for run in (path, two))
        assert ours == theirs, artifact


def test_interactions_are_refused_for_searches_that_add_up(tmp_path, tiny_model):
    for own, message in (
        (["search.interactions=24"], "search.interactions=24: SnapFusionSearch adds up losses"),
        (["search=program", "search.interactions=5"], "search.interactions=5 must be 0 or at least 12"),
        (["search.interactions_by=x"], "interactions_by='x' is unknown"),
    ):
        refused = run("+experiment=prune_unet", f"root={tmp_path}", *own, *tiny_model)
        assert refused.returncode == 1 and message in refused.stderr, refused.stderr
