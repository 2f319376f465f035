"""Blocks in int8 and merged tokens as actions: labels, what goes together, scores, times, decisions, and the job."""

import itertools
import json
import random
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import StackDataset

from slimstep.engine.config import TrainConfig
from slimstep.engine.loop import train
from slimstep.engine.run import Run
from slimstep.eval.config import LatencyConfig
from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.metric import as_metric
from slimstep.eval.pages.runs import read_run
from slimstep.eval.sampling import Sampler
from slimstep.models.architecture import BlockSpec
from slimstep.models.card import network_line
from slimstep.models.families.quantized import QuantizedLinear
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.pipeline import load_pipeline
from slimstep.prune.budgets import choices, read_first_round
from slimstep.prune.changed import merged_labels, offered_narrower, quantized_labels
from slimstep.prune.changes import Change, changes_in
from slimstep.prune.config import SearchConfig
from slimstep.prune.evolve import apply, choose_copies, choose_removals, record_json
from slimstep.prune.job import check_actions
from slimstep.prune.latency import latency_table, predicted_ms, table_without
from slimstep.prune.program import cheapest_cover
from slimstep.prune.scores import score_blocks
from slimstep.prune.screening import Screen, screen_blocks
from tests.models.conftest import small_inputs, small_stock_unet
from tests.prune.test_changes import value
from tests.prune.test_job import run
from tests.prune.test_similarity import PROMPTS, made
from tests.tiny import small_unet

CPU = torch.device("cpu")
ALL = SearchConfig(actions=["remove", "narrow", "quantize", "merge"], widths=[0.5])


@pytest.fixture(scope="module")
def unet():
    return PrunableUNet2DConditionModel.from_unet(small_stock_unet())


# ---- labels, and what goes together ----


def test_a_label_says_the_dtype_or_the_share_of_merged_tokens():
    for label in ("a:dtype@int8", "a.b.0:merge@0.25", "a:merge@0.5"):
        assert Change.of(label).label == label
    assert Change.of("a:dtype@fp8") == Change("a", "dtype", "fp8") and Change.of("a:merge@0.5").share == 0.5
    actions = [Change.of(f"a{rest}").action for rest in ("", ":ff@0.5", ":dtype@int8", ":merge@0.5")]
    assert actions == ["remove", "narrow", "quantize", "merge"]
    architecture = {}
    for label in ("a:dtype@int8", "a:merge@0.5", "a:ff@0.25"):
        architecture = Change.of(label).applied_to(architecture)
    assert architecture == {"a": BlockSpec(widths={"ff": 0.25}, dtype="int8", merge=0.5)}
    labels = {change.label for change in changes_in("a", architecture["a"])}
    assert labels == {"a:dtype@int8", "a:merge@0.5", "a:ff@0.25"}
    assert Change.of("a").applied_to(architecture) == {"a": BlockSpec(0)}


@pytest.mark.parametrize(
    ("one", "other", "excludes"),
    [
        ("a", "a:dtype@int8", True), ("a", "a:merge@0.5", True), ("a:dtype@int8", "a:dtype@fp8", True),
        ("a:dtype@int8", "a:merge@0.5", True), ("a:dtype@int8", "a:ff@0.5", True),
        ("a:merge@0.5", "a:merge@0.25", True), ("a:merge@0.5", "a:attn1@0.5", True),
        ("a:merge@0.5", "a:ff@0.5", False), ("a:merge@0.5", "a:attn2@0", False),
        ("a:dtype@int8", "b:dtype@int8", False), ("a:merge@0.5", "b:dtype@int8", False), ("a", "a.b:dtype@int8", True),
    ],
)  # fmt: skip
def test_changes_of_the_time_of_one_part_are_not_taken_together(one, other, excludes):
    assert Change.of(one).excludes(Change.of(other)) == Change.of(other).excludes(Change.of(one)) == excludes


def test_the_actions_of_a_unet_and_of_a_transformer(unet):
    attentions = [block for block in unet.blocks if "attentions" in block]
    assert quantized_labels(unet, ["int8"]) == [f"{block}:dtype@int8" for block in attentions]
    merges = merged_labels(unet, [0.5, 0.25])
    assert merges == [f"{block}:merge@{share:g}" for block in attentions for share in (0.25, 0.5)]
    transformer = made("SD3")[1]
    assert quantized_labels(transformer, ["int8", "fp8"]) == [
        f"{block}:dtype@{dtype}" for block in transformer.blocks for dtype in ("int8", "fp8")
    ]
    assert merged_labels(transformer, [0.5]) == []
    offered = offered_narrower(unet, ALL)
    assert {Change.of(label).action for label in offered} == {"narrow", "quantize", "merge"}
    kept = SearchConfig(actions=["quantize"], keep=["down_blocks.*", "mid_block.*"])
    assert offered_narrower(unet, kept) == [f"{b}:dtype@int8" for b in attentions if b.startswith("up_blocks")]
    assert offered_narrower(unet, SearchConfig()) == []


def test_later_rounds_offer_what_goes_with_what_was_done(unet):
    first, second, third = unet.mergeable_blocks[:3]
    changed = unet.with_architecture(
        {first: {"dtype": "int8"}, second: {"merge": 0.25}, third: {"widths": {"ff": 0.5}}, unet.mergeable_blocks[3]: 0}
    )
    offered = offered_narrower(changed, ALL)
    of = lambda block: [label.partition(":")[2] for label in offered if label.startswith(f"{block}:")]  # noqa: E731
    assert of(first) == [] == of(unet.mergeable_blocks[3])
    assert of(second) == ["attn2@0.5", "attn2@0", "ff@0.5", "ff@0", "merge@0.5"]
    assert of(third) == ["attn1@0.5", "attn1@0", "attn2@0.5", "attn2@0", "ff@0", "merge@0.25", "merge@0.5"]


# ---- measurements ----


@pytest.mark.parametrize("kind", ["UNet", "SD3"])
def test_scores_and_screen_of_such_a_change_are_those_of_surgery(kind, tiny_clip_folder):
    pipeline, network, _ = made(kind)
    sampler, scorer = Sampler(pipeline, 2, 2.0), ClipScorer(f"local-dir:{tiny_clip_folder}")
    found = quantized_labels(network, ["int8"])
    labels = [found[0], network.kept_blocks[1], *merged_labels(network, [0.75])[:1], found[-1]]
    shared = PROMPTS, 5, Accelerator(cpu=True)
    before = {key: weight.clone() for key, weight in network.state_dict().items()}
    table = score_blocks(network, sampler, as_metric(scorer), *shared, blocks=labels)
    screen = screen_blocks(network, sampler, *shared, changes=labels)
    assert all(torch.equal(before[key], weight) for key, weight in network.state_dict().items())
    assert list(table.record({})["narrower"]) == [label for label in labels if ":" in label]
    count, texts = len(PROMPTS.prompts), scorer.text(PROMPTS.prompts)
    for n, label in enumerate(labels):
        surgery = network.with_architecture(Change.of(label).applied_to({}))
        lost = table.base_P - scorer.score(sampler.images(surgery, PROMPTS.prompts, range(count)), texts)
        torch.testing.assert_close(table.loss_NP[n], lost, atol=0.05, rtol=0)
        assert 0 < screen.errors[label] < (10 if label in network.blocks else 0.5)


def test_a_screen_counts_what_excludes_one_another_once():
    screen = Screen({"a:dtype@int8": 0.1, "a:ff@0.5": 0.15, "a:merge@0.5": 0.3, "b": 4.0}, torch.zeros(1))
    ms = {"a:dtype@int8": 2.0, "a:ff@0.5": 1.0, "a:merge@0.5": 1.5, "b": 2.0}
    assert screen.cheapest(ms, 1.9) == ("a:dtype@int8", "a:ff@0.5")
    assert screen.cheapest(ms, 2.4) == ("a:dtype@int8", "a:ff@0.5", "a:merge@0.5")  # the last two: 2.5
    assert screen.cheapest(ms, 2.6) == tuple(screen.errors)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_table_times_such_changes_by_surgery(unet, compiled, monkeypatch):
    if compiled:  # differences of whole networks; what the compiler makes of them is of no matter here
        monkeypatch.setattr("torch.compile", lambda network, **_: network)
    labels = [f"{block}:dtype@int8" for block in unet.mergeable_blocks[:2]]
    labels += [f"{block}:merge@{share}" for block in unet.mergeable_blocks[:2] for share in ("0.25", "0.5")]
    config = LatencyConfig(iterations=3, additive_samples=3, warmup=1, compile=compiled)
    if compiled:
        unet = unet.with_architecture(dict.fromkeys(unet.blocks[6:], 0))
        labels = [label for label in labels if Change.of(label).block in unet.kept_blocks]
    table = latency_table(unet, config, CPU, labels)
    assert list(table["narrower"]) == labels and all(isinstance(e["ms"], float) for e in table["narrower"].values())
    assert not any(isinstance(module, QuantizedLinear) for module in unet.modules())


@pytest.mark.parametrize("seed", range(4))
def test_a_table_of_known_times_adds_up_and_refuses_what_does_not(unet, seed):
    draw = random.Random(seed)
    labels = offered_narrower(unet, ALL)
    table = {"full_ms": 100.0, "sites": {block: {"ms": 1.0} for block in unet.blocks},
             "narrower": {label: {"ms": 0.01 * n} for n, label in enumerate(labels)}}  # fmt: skip
    chosen = draw.sample([*unet.blocks, *labels], 40)
    kept = [c for n, c in enumerate(chosen) if not any(Change.of(c).excludes(Change.of(d)) for d in chosen[:n])]
    architecture = {}
    for label in kept:
        architecture = Change.of(label).applied_to(architecture)
    with torch.device("meta"):
        pruned = PrunableUNet2DConditionModel.from_config(unet.config, depths=architecture)
    saved = sum(table["narrower"][c]["ms"] if ":" in c else 1.0 for c in kept)
    assert predicted_ms(table, pruned) == pytest.approx(100.0 - saved)
    further = offered_narrower(pruned, ALL)
    after = table_without(table, pruned, further)
    label = draw.choice([label for label in further if ":merge" in label or ":ff" in label])
    with torch.device("meta"):
        depths = Change.of(label).applied_to(pruned.architecture)
        more = PrunableUNet2DConditionModel.from_config(unet.config, depths=depths)
    assert predicted_ms(table, more) == pytest.approx(after["full_ms"] - after["narrower"][label]["ms"])
    block = unet.mergeable_blocks[0]
    with torch.device("meta"):
        mixed = {block: {"dtype": "int8", "merge": 0.5}}
        mixed = PrunableUNet2DConditionModel.from_config(unet.config, depths=mixed)
    with pytest.raises(ValueError, match=f"cannot say what {block}:dtype@int8 and {block}:merge@0.5 save together"):
        predicted_ms(table, mixed)
    with pytest.raises(ValueError, match=r"no entry for .*:dtype@int8; .*=\[remove,quantize\] and search.dtypes"):
        table_without({**table, "narrower": {}}, unet, quantized_labels(unet, ["int8"]))


# ---- decisions ----


@pytest.mark.parametrize("seed", range(12))
def test_the_program_finds_the_cheapest_set_of_all_kinds(seed):
    draw = random.Random(seed)
    labels = ["a", "a:ff@0.5", "a:attn1@0.5", "a:dtype@int8", "a:dtype@fp8", "a:merge@0.5", "a:merge@0.25",
              "b", "b:merge@0.5", "b:dtype@int8", "b:ff@0.25", "c"]  # fmt: skip
    values = [value(label, draw.uniform(-0.5, 5), draw.uniform(0.1, 3)) for label in labels]
    excess = draw.uniform(0.5, 6)

    def fits(some):
        apart = not any(x.change.excludes(y.change) for x, y in itertools.combinations(some, 2))
        return apart and sum(v.saved_ms for v in some) >= excess

    def price(some):
        return sum(max(v.delta_clip, 0) for v in some)

    sets = list(itertools.chain.from_iterable(itertools.combinations(values, k) for k in range(len(values) + 1)))
    chosen, possible = cheapest_cover(values, excess), [some for some in sets if fits(some)]
    assert (chosen is None) == (not possible)
    if chosen is not None:
        assert fits(chosen) and price(chosen) == pytest.approx(min(map(price, possible)), abs=0.02)


def test_what_saves_no_time_is_never_taken_and_what_does_is_ranked_with_all():
    values = [value("a:dtype@int8", 0.0, -0.5), value("a:merge@0.5", 0.1, 1.0), value("a", 4.0, 2.0),
              value("b:dtype@int8", 0.3, 1.0), value("b:ff@0.5", 0.6, 1.0)]  # fmt: skip
    actions = choose_removals(values, 10.0, 6.0)
    assert [(a.action, a.change.label) for a in actions] == [("merge", "a:merge@0.5"), ("quantize", "b:dtype@int8")]
    assert apply({}, actions) == {"a": BlockSpec(merge=0.5), "b": BlockSpec(dtype="int8")}
    assert record_json(actions[1])["share"] == "int8"
    assert not choose_copies([value("b:dtype@int8", 3.0, 1.0)], 5.0, 9.0, ["b"])


# ---- recovery ----


class Killed(Exception):
    pass


def distilled(teacher, dies_at=0):
    """The student gives what the teacher gives; it dies at its n-th call."""
    calls = itertools.count(1)

    def objective(student, batch, generator):
        if next(calls) == dies_at:
            raise Killed
        inputs = small_inputs(teacher, len(batch["x"]))
        inputs["sample"] = batch["x"] + torch.randn(batch["x"].shape, generator=generator)
        with torch.no_grad():
            target = teacher(**inputs).sample
        return (student(**inputs).sample - target).square().mean(), {}

    return objective


def recovered(folder, teacher, architecture, dies_at=0, **options):
    AcceleratorState._reset_state(True)
    accelerator, student = Accelerator(cpu=True), teacher.with_architecture(architecture)
    samples = StackDataset(x=torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(5)))
    config = TrainConfig(**{"steps": 6, "checkpoint_every": 2, "learning_rate": 1e-3, **options},
                         batch_size=2, log_every=1, warmup_steps=1)  # fmt: skip
    try:
        run = Run(folder, accelerator, seed=3)
        return train(student.requires_grad_(), distilled(teacher, dies_at), samples, config, run, "recovery")
    finally:
        accelerator.free_memory()


def test_a_killed_recovery_of_such_a_student_ends_with_the_bits_of_a_quiet_one(unet, tmp_path):
    first, second = unet.mergeable_blocks[:2]
    architecture = {first: {"dtype": "int8"}, second: {"merge": 0.5}}
    options = {"ema_decay": 0.9, "gradient_checkpointing": True}
    quiet = recovered(tmp_path / "quiet", unet, architecture, **options)
    with pytest.raises(Killed):
        recovered(tmp_path / "killed", unet, architecture, 4, **options)
    resumed = recovered(tmp_path / "killed", unet, architecture, **options)
    assert all(torch.equal(resumed.state_dict()[key], weight) for key, weight in quiet.state_dict().items())
    loaded = recovered(tmp_path / "killed", unet, architecture, **options)  # the finished one
    with torch.no_grad():
        outputs = [network(**small_inputs(unet)).sample for network in (quiet, resumed, loaded)]
    assert all(torch.equal(outputs[0], output) for output in outputs)


def test_recovery_brings_a_quantized_student_nearer_to_its_teacher(unet, tmp_path):
    """Low-rank training too: the update is added to the float weights, of which the copy in int8 is made."""
    architecture = {block: {"dtype": "int8"} for block in unet.mergeable_blocks[:4]}
    architecture |= {"down_blocks.0.resnets.1": 0, "up_blocks.3.resnets.1": 0}
    options = {"steps": 40, "checkpoint_every": 40, "learning_rate": 1e-3}

    def error(student):
        with torch.no_grad():
            return (student(**small_inputs(unet)).sample - unet(**small_inputs(unet)).sample).square().mean().item()

    before = error(unet.with_architecture(architecture))
    assert error(recovered(tmp_path / "whole", unet, architecture, **options)) < 0.8 * before
    low = recovered(tmp_path / "low", unet, architecture, lora_rank=2, **options)
    assert error(low) < before and sum(isinstance(module, QuantizedLinear) for module in low.modules()) > 30


# ---- configurations ----


def test_wrong_options_are_named():
    for keys, message in (
        ({"actions": ["copy"]}, r"actions=\['copy'\] must name another than copy"),
        ({"dtypes": ["int4"]}, r"search.dtypes=\['int4'\] must be some of \('int8', 'fp8'\)"),
        ({"actions": ["quantize"], "dtypes": []}, r"search.dtypes=\[\] must be some of"),
        ({"merge": [0.9]}, r"search.merge=\[0.9\] must be shares above 0, up to 0.75: of four tokens one"),
        ({"actions": ["merge"], "merge": []}, r"search.merge=\[\] must be shares"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            SearchConfig(**keys)
        assert "\n" not in str(caught.value)


def test_networks_and_devices_that_cannot_are_named(unet):
    def checked(network, **keys):
        config = SimpleNamespace(search=SearchConfig(**keys))
        check_actions(SimpleNamespace(unet=network, config=config, device=CPU))

    checked(unet, actions=["quantize", "merge"])
    checked(unet, dtypes=["fp8"])  # which nobody asks for
    with pytest.raises(ValueError, match="fp8 needs a CUDA device of compute capability 8.9 or newer, and this is cpu"):
        checked(unet, actions=["quantize"], dtypes=["int8", "fp8"])
    with pytest.raises(ValueError, match=r"a SD3Transformer2DModel has no self-attention that can merge tokens; leave"):
        checked(made("SD3")[1], actions=["remove", "merge"])


# ---- the job ----


def table_file(folder):
    """Of another machine: int8 saves most in the first block, merging in the last, and nothing else is worth it."""
    network = PrunableUNet2DConditionModel.from_unet(small_unet())
    search = SearchConfig(actions=["quantize", "merge"], merge=[0.5])
    narrower = dict.fromkeys(offered_narrower(network, search), -1.0)
    first, *_, last = network.mergeable_blocks
    narrower |= {f"{first}:dtype@int8": 1.0, f"{last}:merge@0.5": 1.0}
    table = {"full_ms": 10.0, "sites": {block: {"ms": 1.5} for block in network.blocks},
             "narrower": {label: {"ms": ms} for label, ms in narrower.items()}}  # fmt: skip
    (folder / "table.json").write_text(json.dumps(table))
    return folder / "table.json", first, last


OWN = ["+experiment=prune_unet", "search.actions=[quantize,merge]", "search.merge=[0.5]", "search.target_fraction=0.8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("others")
    table, first, last = table_file(root)
    own = [*OWN, f"latency.table={table}", f"root={root}", *tiny_model]
    done = run(*own, "search=program")
    assert done.returncode == 0, done.stderr
    return root / "prune_unet", first, last, own, done


def test_the_job_takes_them_by_a_table_and_exports_the_network(finished):
    path, first, last, _, done = finished
    after = json.loads((path / "round-01/decision.json").read_text())["after"]
    assert after == {first: {"dtype": "int8"}, last: {"merge": 0.5}}
    assert f"quantizes {first}:dtype@int8" in done.stderr and f"merges {last}:merge@0.5" in done.stderr
    unet = load_pipeline(path / "export").unet
    assert unet.architecture == {first: BlockSpec(dtype="int8"), last: BlockSpec(merge=0.5)}
    line = network_line("unet", unet.config)
    assert f"quantized: `{first}` (linear layers in int8); merging: `{last}` (50% of its tokens)" in line
    assert line in (path / "export/README.md").read_text()
    page = (path / "report.html").read_text()
    assert f"<code>{first}</code> in int8" in page and f"<code>{last}</code>, 50 % of its tokens" in page
    assert "1 merging, 1 in int8" in page and "What every change costs and saves" in page
    assert read_run(path).predicted and (path / "report/changes.png").is_file()


def test_a_finished_run_makes_nothing_anew_and_tells_other_budgets(finished):
    path, first, _, own, _ = finished
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*.json")}
    again = run(*own, "search=program")
    assert again.returncode == 0, again.stderr
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*.json")} == before
    found = choices(read_first_round(path), [0.9])
    assert {len(choice.actions) for choice in found} == {1}


def test_the_plan_counts_them(finished, tmp_path):
    *_, own, _ = finished
    planned = run(*own, "search=program", "plan=true", f"root={tmp_path}")
    assert planned.returncode == 0, planned.stderr
    scores = next(line for line in planned.stdout.splitlines() if "round-00/scores.json" in line)
    assert "blocks in other dtypes" in scores and "merges" in scores and list(tmp_path.iterdir()) == []


def test_what_cannot_is_refused_before_anything_is_trained(tmp_path, tiny_model):
    own = ["+experiment=prune_unet", f"root={tmp_path}", *tiny_model]
    refused = run(*own, "search.actions=[quantize]", "search.dtypes=[fp8]")
    assert refused.returncode == 1 and "fp8 needs a CUDA device" in refused.stderr and "Traceback" not in refused.stderr
    refused = run(*own, "search=random", "search.actions=[remove,quantize]")
    assert refused.returncode == 1 and "RandomRemoval scores nothing" in refused.stderr
    by_hand = "search.method.architecture={mid_block.attentions.0: {dtype: fp8}}"
    refused = run(*own, "search=manual", by_hand)
    assert refused.returncode == 1 and "fp8 needs a CUDA device" in refused.stderr
