"""Narrower parts as actions: labels, scores, screen, latencies, searches, and the job that takes them."""

import itertools
import json
import random
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from slimstep.eval.config import LatencyConfig
from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.metric import as_metric
from slimstep.eval.pages.runs import read_run
from slimstep.eval.pages.text import signed
from slimstep.eval.sampling import Sampler
from slimstep.models.architecture import BlockSpec
from slimstep.models.card import network_line
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.pipeline import load_pipeline
from slimstep.prune.budgets import choices, read_first_round
from slimstep.prune.changed import narrower_labels
from slimstep.prune.changes import Change, without_kept
from slimstep.prune.config import SearchConfig
from slimstep.prune.evolve import BlockValue, apply, choose_copies, choose_removals, record_json
from slimstep.prune.latency import latency_table, predicted_ms, table_without
from slimstep.prune.program import cheapest_cover, program_removals
from slimstep.prune.rounds import situation_of
from slimstep.prune.scores import score_blocks
from slimstep.prune.screening import Screen, screen_blocks
from tests.models.conftest import small_stock_unet
from tests.prune.test_job import run
from tests.prune.test_similarity import KINDS, PROMPTS, made

CPU = torch.device("cpu")
SHARES = (0.75, 0.5, 0.25)


@pytest.fixture(scope="module")
def unet():
    return PrunableUNet2DConditionModel.from_unet(small_stock_unet())


def value(label, lost, saved_ms, **more):
    change = Change.of(label)
    return BlockValue(change.block, lost, 0.1, saved_ms, part=change.part, share=change.share, **more)


# ---- labels ----


def test_a_label_says_the_change():
    for label in ("mid_block.resnets.0", "a.attentions.1:ff@0.25", "b:attn1@0"):
        assert Change.of(label).label == label
    assert Change.of("b:attn1@0") == Change("b", "attn1", 0.0) and Change.of("b").part is None


@pytest.mark.parametrize(
    ("one", "other", "excludes"),
    [
        ("a", "a:ff@0.5", True), ("a:ff@0.5", "a:ff@0.25", True), ("a:ff@0.5", "a:attn@0.5", False),
        ("a", "a.layer:ff@0.5", True), ("a:ff@0.5", "b:ff@0.5", False), ("a", "ab", False), ("a", "a.layer", True),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_together(one, other, excludes):
    assert Change.of(one).excludes(Change.of(other)) == Change.of(other).excludes(Change.of(one)) == excludes


def test_every_label_leaves_fewer_units_than_the_one_before(unet):
    labels = narrower_labels(unet, SHARES)
    first = {Change.of(label).part: Change.of(label).block for label in reversed(labels)}
    counts = {}
    for change in map(Change.of, labels):
        if change.block in first.values():
            sizes = counts.setdefault((change.block, change.part), [])
            sizes.append(unet.with_architecture(change.applied_to(unet.architecture)).num_parameters())
    assert {part for _, part in counts} == first.keys()
    assert all(sizes == sorted(set(sizes), reverse=True) for sizes in counts.values())
    assert max(itertools.chain(*counts.values())) < unet.num_parameters()
    narrowed = unet.with_architecture(Change.of(labels[0]).applied_to({}))
    further = narrower_labels(narrowed, SHARES)
    assert labels[0] not in further and further == labels[1:]
    assert without_kept(labels, ["*.attentions.*", "mid_block.*"]) == [
        label for label in labels if "attentions" not in label and not label.startswith("mid_block.")
    ]


# ---- measurements ----


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_screen_of_a_narrower_part_are_those_of_surgery(kind, tiny_clip_folder):
    pipeline, network, _ = made(kind)
    sampler, scorer = Sampler(pipeline, 2, 2.0), ClipScorer(f"local-dir:{tiny_clip_folder}")
    narrower = narrower_labels(network, (0.5,))
    labels = [narrower[-1], network.kept_blocks[1], narrower[0]]
    shared = PROMPTS, 5, Accelerator(cpu=True)
    table = score_blocks(network, sampler, as_metric(scorer), *shared, blocks=labels)
    screen = screen_blocks(network, sampler, *shared, changes=labels)
    assert table.blocks == tuple(labels) == tuple(screen.errors)
    record = table.record({})
    assert list(record["sites"]) == labels[1:2] and list(record["narrower"]) == labels[::2]
    count, texts = len(PROMPTS.prompts), scorer.text(PROMPTS.prompts)
    for n, label in enumerate(labels):
        surgery = network.with_architecture(Change.of(label).applied_to({}))
        lost = table.base_P - scorer.score(sampler.images(surgery, PROMPTS.prompts, range(count)), texts)
        torch.testing.assert_close(table.loss_NP[n], lost, atol=0.05, rtol=0)
        errors = []
        for index in range(count):
            inputs, cond = [], sampler.encode(PROMPTS.prompts).rows([index])
            sampler.latents_at(network, cond, [index], inputs=inputs)
            x_BCHW, t = inputs[index % 2]
            whole, without = (sampler.predict(some, x_BCHW, t[None], cond) for some in (network, surgery))
            errors.append(((without - whole).square().mean() / whole.square().mean()).item())
        assert screen.errors[label] == pytest.approx(sum(errors) / count, rel=2e-3, abs=1e-7)


def test_a_screen_counts_what_a_part_saves_once():
    screen = Screen({"a": 9.0, "a:ff@0.75": 0.1, "a:ff@0.5": 0.2, "b": 0.6, "c": 3.0}, torch.zeros(1))
    ms = {"a": 3.0, "a:ff@0.75": 1.0, "a:ff@0.5": 1.5, "b": 2.0, "c": 2.0}
    assert screen.cheapest(ms, 1.5) == ("a:ff@0.75", "a:ff@0.5")
    assert screen.cheapest(ms, 2.4) == ("a:ff@0.75", "a:ff@0.5", "b")  # and not 1.0 + 1.5
    assert screen.cheapest(ms, 99) == tuple(screen.errors)


def test_a_table_has_every_narrower_part_and_mixed_architectures(unet):
    labels = narrower_labels(unet, (0.5,))
    config = LatencyConfig(iterations=3, additive_samples=4, warmup=1)
    table = latency_table(unet, config, CPU, labels)
    assert list(table["narrower"]) == labels and list(table["sites"]) == list(unet.kept_blocks)
    changed = [label for sample in table["samples"] for label in sample["removed"]]
    assert any(":" in label for label in changed) and any(":" not in label for label in changed)
    assert "narrower" not in latency_table(unet, LatencyConfig(iterations=3, additive_samples=1), CPU)


@pytest.mark.parametrize("seed", range(5))
def test_a_table_of_known_times_adds_up_for_any_architecture(unet, seed):
    """Every part of every unit takes a known time; a copy takes what its block takes."""
    draw = random.Random(seed)
    labels = narrower_labels(unet, SHARES)
    table = {
        "full_ms": 100.0,
        "sites": {block: {"ms": 1.0} for block in unet.blocks},
        "narrower": {label: {"ms": 0.3 * (1 - Change.of(label).share)} for label in labels},
    }
    chosen = draw.sample([*unet.blocks, *labels], 30)
    kept = [c for n, c in enumerate(chosen) if not any(Change.of(c).excludes(Change.of(d)) for d in chosen[:n])]
    copied = draw.choice([b for b in unet.copyable_blocks if b not in kept and not any(c.startswith(b) for c in kept)])
    architecture = {copied: BlockSpec(2)}
    for label in kept:
        architecture = Change.of(label).applied_to(architecture)
    with torch.device("meta"):
        pruned = PrunableUNet2DConditionModel.from_config(unet.config, depths=architecture)
    saved = sum(table["narrower"][c]["ms"] if ":" in c else 1.0 for c in kept)
    assert predicted_ms(table, pruned) == pytest.approx(101.0 - saved)
    further = narrower_labels(pruned, SHARES)
    after = table_without(table, pruned, further)
    assert after["full_ms"] == pytest.approx(101.0 - saved) and list(after["narrower"]) == further
    label = draw.choice(further)
    with torch.device("meta"):
        more = PrunableUNet2DConditionModel.from_config(
            unet.config, depths=Change.of(label).applied_to(pruned.architecture)
        )
    assert predicted_ms(table, more) == pytest.approx(after["full_ms"] - after["narrower"][label]["ms"])
    with pytest.raises(ValueError, match=r"no entry for .*; \+experiment=latency_table makes one with search.actions"):
        table_without({**table, "narrower": {}}, unet, labels)


# ---- decisions ----


@pytest.mark.parametrize("seed", range(12))
def test_the_program_finds_the_cheapest_mixed_set(seed):
    draw = random.Random(seed)
    labels = ["a", "a:ff@0.75", "a:ff@0.5", "a:attn@0.5", "b", "b.0", "b.0:ff@0.5", "b.1:ff@0.5", "c", "d"]
    values = [value(label, draw.uniform(-0.5, 5), draw.uniform(0.1, 3)) for label in labels]

    def fits(some):
        apart = not any(x.change.excludes(y.change) for x, y in itertools.combinations(some, 2))
        return apart and sum(v.saved_ms for v in some) >= excess

    def price(some):
        return sum(max(v.delta_clip, 0) for v in some)

    excess = draw.uniform(0.5, 6)
    sets = list(itertools.chain.from_iterable(itertools.combinations(values, k) for k in range(len(values) + 1)))
    chosen, possible = cheapest_cover(values, excess), [some for some in sets if fits(some)]
    assert (chosen is None) == (not possible)
    if chosen is not None:
        assert fits(chosen) and price(chosen) == pytest.approx(min(map(price, possible)), abs=0.02)


def test_greedy_takes_the_best_bargains_of_both_kinds_and_one_width_of_a_part():
    values = [value("a", 4.0, 2.0), value("a:ff@0.5", 0.1, 1.0), value("a:ff@0.25", 0.5, 1.5), value("b", 2.0, 2.0)]
    actions = choose_removals(values, 10.0, 7.0)
    assert [(a.action, a.change.label) for a in actions] == [("narrow", "a:ff@0.5"), ("remove", "b")]
    assert apply({}, actions) == {"a": BlockSpec(widths={"ff": 0.5}), "b": BlockSpec(0)}
    assert [a.change.label for a in program_removals(values, 10.0, 9.0)] == ["a:ff@0.5"]
    assert not choose_copies([value("a:ff@0.5", 3.0, 1.0)], 5.0, 9.0, ["a"])
    assert record_json(actions[0])["share"] == 0.5 and "part" not in record_json(actions[1])


@pytest.mark.parametrize("narrower", [{}, {"narrower": {"b:ff@0.5": {"ms": 0.5}}}])
def test_a_round_with_nothing_left_to_narrow_has_the_removals(unet, narrower):
    config = SimpleNamespace(search=SearchConfig(actions=["remove", "narrow"], keep=["a"]))
    measures = SimpleNamespace(teacher=SimpleNamespace(config=config), search=SimpleNamespace(needs_scores=True))
    table = {"full_ms": 10.0, "sites": {"a": {"ms": 1.0}, "b": {"ms": 2.0}}, **narrower}
    situation = situation_of(measures, unet, table, 10.0, 10.0, 0)
    assert [value.change.label for value in situation.values] == ["b", *narrower.get("narrower", {})]
    assert situation.copyable == ()


def test_wrong_actions_are_named():
    with pytest.raises(ValueError, match=r"search.actions=\['copy'\] must name another than copy"):
        SearchConfig(actions=["copy"])
    with pytest.raises(ValueError, match=r"of .*'merge', 'copy'\), and not \['cut'\]"):
        SearchConfig(actions=["remove", "cut"])
    with pytest.raises(ValueError, match=r"search.widths=\[1.0\] must be shares between 0 and 1"):
        SearchConfig(widths=[1.0])


# ---- the job ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("narrower")
    own = ["search=program", "search.actions=[narrow]", "search.keep=[down_blocks.0.*]"]
    done = run("+experiment=prune_unet", f"root={root}", "search.target_fraction=0.3", *own, *tiny_model)
    assert done.returncode == 3 and "was not reached" in done.stderr, done.stderr  # all parts are not as much
    return root / "prune_unet"


def test_the_job_narrows_and_its_export_is_the_network(finished):
    decisions = [json.loads((finished / f"round-0{r}/decision.json").read_text()) for r in (0, 1)]
    actions = [action for decision in decisions for action in decision["actions"]]
    narrowed = [action for action in actions if action["action"] == "narrow"]
    assert narrowed == actions and not any(action["site"].startswith("down_blocks.0.") for action in actions)
    assert any(value.get("part") for value in decisions[0]["values"])
    unet = load_pipeline(finished / "export").unet
    for action in narrowed:  # a second round may have narrowed it further
        assert unet.architecture[action["site"]].widths[action["part"]] <= action["share"]
    page = (finished / "report.html").read_text()
    assert "What every change costs and saves" in page and f"{narrowed[0]['part']} at " in page
    lost = [sum(action["delta_clip"] for action in decision["actions"]) for decision in decisions]
    predicted = read_run(finished).predicted
    assert list(predicted.values()) == pytest.approx([-lost[0], -lost[0] - lost[1]])
    assert f"<td>{signed(predicted['round-01'])}</td>" in page
    line = network_line("unet", unet.config)
    assert "narrowed: `" in line and "narrowed" in (finished / "export/README.md").read_text()


def test_budgets_of_the_run_are_those_of_its_first_round(finished):
    budgets = json.loads((finished / "round-00/budgets.json").read_text())
    found = {(b["search"], b["fraction"]): b for b in budgets}
    again = {(c.search, c.fraction): c for c in choices(read_first_round(finished), [0.95, 0.9])}
    assert found and all(budget["share"] <= budget["fraction"] for budget in budgets)
    for key in found.keys() & again.keys():
        assert found[key]["changes"] == [action.change.label for action in again[key].actions]


def test_the_decided_architecture_can_be_read_back(finished, tmp_path, tiny_model):
    again = run("+experiment=prune_unet", f"root={tmp_path}", "search=manual",
                f"search.method.architecture={finished}/round-01/decision.json", *tiny_model)  # fmt: skip
    assert again.returncode == 0, again.stderr
    ours, theirs = (load_pipeline(path / "export").unet.architecture for path in (tmp_path / "prune_unet", finished))
    assert ours == theirs and "narrows" in again.stderr


def test_what_cannot_narrow_is_refused_before_anything_is_trained(tmp_path, tiny_model):
    refused = run("+experiment=prune_unet", f"root={tmp_path}", "search=random", "search.actions=[narrow]", *tiny_model)
    assert refused.returncode == 1 and "RandomRemoval scores nothing" in refused.stderr
    refused = run("+experiment=prune_unet", f"root={tmp_path}", "search.keep=[nothing.*]", *tiny_model)
    assert refused.returncode == 1 and "search.keep=['nothing.*'] names no block" in refused.stderr
    refused = run("+experiment=prune_unet", f"root={tmp_path}", "search.keep=['*']", *tiny_model)
    assert refused.returncode == 1 and "names all blocks: there is nothing to prune" in refused.stderr
