"""Scores after local recovery: what neighbours make up for, that no trace stays, and what a linear map leaves."""

import json

import pytest
import torch
from accelerate import Accelerator

from benchmarks.search_truth import block_predictors, recovered_predictors
from slimstep.engine.config import TrainConfig
from slimstep.eval.config import ScoringConfig
from slimstep.eval.metrics.metric import ImageError
from slimstep.eval.sampling import Sampler
from slimstep.models.architecture import nested
from slimstep.prune.changed import narrower_labels
from slimstep.prune.evolve import BlockValue, record_json
from slimstep.prune.linear_maps import LeastSquares
from slimstep.prune.local_recovery import (
    evaluations_of_sampling,
    neighbours,
    score_recovered,
    training_alone,
    weights_of,
)
from slimstep.prune.scores import score_blocks
from tests.prune.test_job import run
from tests.prune.test_similarity import KINDS, PROMPTS, made

SHIFTED = "mid_block.resnets.0"  # of the UNet: in `planted` it adds a constant


def training(steps=8, batch_size=3, learning_rate=3e-3):
    rate = {"learning_rate": learning_rate, "warmup_steps": 0, "weight_decay": 0.0}
    return TrainConfig(steps=steps, batch_size=batch_size, **rate)


def scored(kind, blocks, network=None, keep=None, guidance=2.5, **options):
    pipeline, unet, _ = made(kind)
    own = training(**options), 0, Accelerator(cpu=True), keep, blocks
    return score_recovered(network or unet, Sampler(pipeline, 2, guidance), ImageError(), PROMPTS, *own)


def some_labels(kind):
    _, unet, block = made(kind)
    return block, narrower_labels(unet, (0.5,))[-1]


@pytest.fixture(scope="module", params=KINDS)
def table(request):
    return request.param, scored(request.param, some_labels(request.param))


@pytest.fixture
def planted():
    """A UNet one of whose ResNets adds a constant, which the bias of the layer before it can add as well."""
    _, unet, _ = made("UNet")
    network = unet.with_architecture({})
    last = network.get_submodule(SHIFTED).conv2
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(0.3 * torch.randn(last.bias.shape, generator=torch.Generator().manual_seed(0)))
    return network


# ---- what recovers ----


def test_training_a_neighbour_undoes_the_removal_of_what_it_can_give(planted):
    both = (SHIFTED, "mid_block.attentions.0")
    row = scored("UNet", both, planted, steps=150, batch_size=6, learning_rate=1e-2).record({})["sites"][SHIFTED]
    assert row["before_recovery"]["delta_clip"] > 0 and row["prediction_error"]["before"] > 1e-3
    assert row["delta_clip"] < 0.2 * row["before_recovery"]["delta_clip"]
    assert row["prediction_error"]["after"] < 0.2 * row["prediction_error"]["before"]
    assert row["psnr"] > row["before_recovery"]["psnr"] + 5


def test_a_linear_map_leaves_nothing_of_a_constant(planted):
    row = scored("UNet", (SHIFTED, "mid_block.attentions.0"), planted, steps=1).record({})["sites"][SHIFTED]
    assert row["prediction_error"]["linear_map"] < 1e-6 * row["prediction_error"]["before"]


def test_a_fitted_map_is_that_of_the_data():
    draw = torch.Generator().manual_seed(0)
    z_BCHW, add_CC = (torch.randn(*shape, generator=draw) for shape in ((8, 5, 6, 6), (5, 5)))
    y_BCHW = torch.einsum("bchw,cd->bdhw", z_BCHW, add_CC) + torch.arange(5.0).view(-1, 1, 1)
    for at, z, y in (("channels second", z_BCHW, y_BCHW),
                     ("channels last", *(x.flatten(2).mT for x in (z_BCHW, y_BCHW)))):  # fmt: skip
        fit = LeastSquares()
        for half in (slice(0, 3), slice(3, 8)):
            fit.add(z[half], y[half])
        torch.testing.assert_close(fit(z), y, rtol=0, atol=2e-2, msg=at)


def test_where_a_block_adds_nothing_the_map_adds_nothing():
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    fit, constant = LeastSquares(), LeastSquares()
    fit.add(z, z)
    constant.add(torch.ones(2, 3, 4), torch.full((2, 3, 4), 3.0))  # no variance at all
    torch.testing.assert_close(fit(z), z)
    torch.testing.assert_close(constant(torch.ones(1, 1, 4)), torch.full((1, 1, 4), 3.0))


# ---- who is trained ----


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_run_directly_before_and_after(kind):
    _, unet, block = made(kind)
    order = list(unet.kept_blocks)
    place = order.index(block)
    assert neighbours(unet, block) == (order[place - 1], order[place + 1])
    assert neighbours(unet, order[0]) == (order[1],) and neighbours(unet, order[-1]) == (order[-2],)
    gone = unet.with_architecture({order[place + 1]: 0})
    assert neighbours(gone, block) == (order[place - 1], order[place + 2])
    alone = unet.with_architecture(dict.fromkeys(order[1:], 0))
    assert neighbours(alone, order[0]) == () and weights_of(alone, ()) == []


def test_within_a_block_neighbours_are_those_that_hold_no_others():
    pipeline, unet, _ = made("SD3")
    divided = unet.with_architecture({})
    divided.divide_blocks()
    first, second = "transformer_blocks.1", "transformer_blocks.2"
    assert neighbours(divided, first) == ("transformer_blocks.0", second)
    assert neighbours(divided, f"{first}.ff") == (f"{first}.attn", f"{second}.attn")
    for block in divided.kept_blocks:
        assert not any(nested(block, other) or block == other for other in neighbours(divided, block))
    label = f"{first}.ff"  # and what is left of a removed sublayer is found on a CPU, too
    own = training(steps=1), 0, Accelerator(cpu=True), None, (label, first)
    rows = score_recovered(divided, Sampler(pipeline, 2, 1.0), ImageError(), PROMPTS, *own).record({})["sites"]
    assert rows[label]["prediction_error"]["linear_map"] is None and rows[label]["before_recovery"]["delta_clip"] > 0


def test_copies_are_trained_with_their_block():
    _, unet, block = made("SD3")
    copied = unet.with_architecture({block: 2}, copy_init="same")
    assert len(weights_of(copied, (block,))) == 2 * len(weights_of(unet, (block,)))


def test_only_neighbours_get_gradients_and_all_is_as_it_was(monkeypatch):
    _, unet, block = made("UNet")
    network = unet.with_architecture({})
    frozen = network.get_submodule(network.kept_blocks[0]).requires_grad_(False)
    network.eval().get_submodule("mid_block").train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    modes = {name: module.training for name, module in network.named_modules()}
    seen, step = [], torch.optim.AdamW.step

    def spy(optimizer, *args):
        seen.append({name for name, parameter in network.named_parameters() if parameter.grad is not None})
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    label = f"{block}:ff@0.5"
    table = scored("UNet", (block, label), network, steps=2)
    near = tuple(f"{name}." for name in neighbours(network, block))
    assert len(near) == 2 and len(seen) == 4
    assert all(names and all(name.startswith(near) for name in names) for names in seen)
    assert {name for names in seen for name in names} == {name for name in flags if name.startswith(near)}
    assert (table.before.psnr_NP != table.after.psnr_NP).any()  # something was trained
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == flags
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_failure_leaves_the_network_as_it_was_and_names_the_change():
    _, unet, block = made("UNet")
    network = unet.with_architecture({})
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(FloatingPointError, match=f"after {block} .*recovery_learning_rate=1e.30"):
        scored("UNet", (block,), network, steps=5, learning_rate=1e30)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_training_alone_keeps_what_it_trains_aside_and_nothing_else(monkeypatch):
    _, unet, block = made("SD3")
    weights, copied, clone = weights_of(unet, (block,)), [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda x, **kw: copied.append(x.numel()) or clone(x, **kw))
    with training_alone(unet, weights):
        assert sum(copied) == sum(weight.numel() for weight in weights) < unet.num_parameters()


# ---- the record ----


def test_the_cached_evaluations_are_the_networks_own_sampling():
    """By hand: inputs, predictions with and without the prompt, and the end."""
    pipeline, unet, _ = made("UNet")
    sampler = Sampler(pipeline, 2, 2.5)
    teacher = evaluations_of_sampling(unet, sampler, PROMPTS, 2, Accelerator(cpu=True))
    assert len(teacher) == 3 * 2 * 2 and teacher.number(1, 1) == 6
    for index in range(3):
        inputs, cond = [], sampler.encode(PROMPTS.prompts).rows([index])
        end = sampler.latents_at(unet, cond, [index], inputs=inputs)
        torch.testing.assert_close(teacher.latents_PCHW[index], end[0], rtol=1e-4, atol=1e-5)
        for step, (x_BCHW, t) in enumerate(inputs):
            torch.testing.assert_close(teacher.x_PSCHW[index, step], x_BCHW[0], rtol=1e-4, atol=1e-5)
            assert teacher.t_PS[index, step] == t
            for kind, own in enumerate((cond, sampler.unconditional)):
                pred = sampler.predict(unet, x_BCHW, t[None], own)[0]
                torch.testing.assert_close(teacher.predicted_PSGCHW[index, step, kind], pred, rtol=1e-4, atol=1e-5)


def test_scores_before_recovery_are_those_without_it(table):
    kind, found = table
    pipeline, unet, _ = made(kind)
    shared = PROMPTS, 3, Accelerator(cpu=True)
    plain = score_blocks(unet, Sampler(pipeline, 2, 2.5), ImageError(), *shared, blocks=some_labels(kind))
    torch.testing.assert_close(found.before.loss_NP, plain.loss_NP, rtol=1e-2, atol=1e-4)
    record, before = found.record({"name": "snapfusion"}), found.before.record({})
    for section, label in zip(("sites", "narrower"), some_labels(kind), strict=True):
        row = record[section][label]
        assert row["before_recovery"]["delta_clip"] == before[section][label]["delta_clip"] != row["delta_clip"]
        assert row["trained"] == list(neighbours(unet, label.partition(":")[0]))
        assert row["n"] == len(row["per_prompt"]) == 3
    assert record["recovery"]["steps"] == 8 and record["recovery"]["evaluations"]["with_gradient"] == 2 * 8 * 3
    narrower = record["narrower"][some_labels(kind)[1]]["prediction_error"]
    assert narrower["linear_map"] is None and narrower["before"] > 0


def test_what_it_cost_is_what_the_network_evaluated(monkeypatch):
    pipeline, unet, block = made("UNet")
    rows, label = {False: 0, True: 0}, narrower_labels(unet, (0.5,))[-1]
    forward = type(unet).forward

    def counted(network, *args, **kwargs):
        rows[torch.is_grad_enabled()] += len(args[0] if args else kwargs["sample"])
        return forward(network, *args, **kwargs)

    monkeypatch.setattr(type(unet), "forward", counted)
    table = scored("UNet", (block, label), steps=2)
    at_once = 2 * 3 * 4  # images before recovery, which are drawn without it, too
    found = table.record({})["recovery"]["evaluations"]
    assert found == {"without_gradient": rows[False] - at_once, "with_gradient": rows[True]}


def test_two_runs_agree_bit_for_bit(table):
    kind, first = table
    again = scored(kind, some_labels(kind))
    assert again.record({}) == first.record({})
    other_order = scored(kind, some_labels(kind)[::-1])  # nor does a change know of the one before it
    assert torch.equal(other_order.after.loss_NP.flip(0), first.after.loss_NP)


def test_a_kill_between_changes_changes_nothing(table, tmp_path, monkeypatch):
    kind, whole = table
    import slimstep.prune.local_recovery as module

    class Killed(Exception):
        pass

    labels, call, trained = some_labels(kind), module.LocalRecovery.__call__, []

    def some(recovery, label):
        if label == labels[1] and len(trained) == 1:
            raise Killed
        trained.append(label)
        return call(recovery, label)

    monkeypatch.setattr(module.LocalRecovery, "__call__", some)
    with pytest.raises(Killed):
        scored(kind, labels, keep=tmp_path)
    assert trained == [labels[0]]
    trained.append("killed")
    assert scored(kind, labels, keep=tmp_path).record({}) == whole.record({})
    assert trained == [labels[0], "killed", labels[1]]  # the first lay there


def test_half_precision_is_refused():
    pipeline, unet, block = made("UNet")
    with pytest.raises(ValueError, match="float32 weights, and these are torch.bfloat16"):
        scored("UNet", (block,), unet.with_architecture({}).to(torch.bfloat16))


def test_settings_that_will_not_do_are_named():
    wrong = {"recovery_steps=-1 must be at least 0": {"recovery_steps": -1},
             "scoring.recovery_learning_rate=0.0 must be above 0": {"recovery_learning_rate": 0.0},
             "scoring.recovery_steps=5: .*racing": {"recovery_steps": 5, "protocol": "racing"}}  # fmt: skip
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            ScoringConfig(**options)


def test_a_value_says_both_losses_and_without_recovery_one():
    plain, both = (BlockValue("a", 1.0, 0.1, 2.0, **more) for more in ({}, {"at_once": 3.0}))
    assert "at_once" not in record_json(plain) and record_json(both)["at_once"] == 3.0
    assert "lost +1.00 ± 0.10 after local recovery, +3.00 before" in both.reason and "recovery" not in plain.reason


# ---- the job, and what reads it ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("recovered")
    own = ["scoring.recovery_steps=2", "scoring.protocol=screened", "search.rounds=1", "search.target_fraction=0.8"]
    done = run("+experiment=prune_unet", f"root={root}", *own, *tiny_model)
    assert done.returncode in (0, 3), done.stderr
    return root / "prune_unet", done.stderr, own


def test_the_job_decides_by_what_recovers_and_shows_both(finished, tiny_model):
    path, said, own = finished
    scores = json.loads((path / "round-00/scores.json").read_text())
    assert "2 steps of local recovery rank the changes alike" in said and scores["recovery"]["steps"] == 2
    assert 1 < len(scores["sites"]) < len(scores["screen"])  # what the screen left out is not trained for
    decision = json.loads((path / "round-00/decision.json").read_text())
    values = {value["site"]: value for value in decision["values"] if value["delta_clip"] is not None}
    assert values.keys() == scores["sites"].keys()
    for block, row in scores["sites"].items():
        assert values[block]["delta_clip"] == row["delta_clip"]
        assert values[block]["at_once"] == row["before_recovery"]["delta_clip"]
    page = (path / "report.html").read_text()
    assert "after local recovery" in page and "the second after 2 steps of training of its neighbours" in page
    plan = run("+experiment=prune_unet", f"root={path.parent}", *own, "plan=true", *tiny_model)
    line = next(line for line in plan.stdout.splitlines() if "2 steps of local recovery, 48 images after it" in line)
    assert "round-00/scores.json" in line and f" {2 * 8 * 12} " in line


REFUSED = {
    "RandomRemoval scores nothing": ["search=random"],
    "EvolutionarySearch measures sets of changes before any recovery": ["search=evolution"],
    "search.interactions measures sets of changes before any recovery": ["search=program", "search.interactions=12"],
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_search_that_has_no_use_for_it_is_refused(why, tmp_path, tiny_model):
    own = [*REFUSED[why], "scoring.recovery_steps=2"]
    refused = run("+experiment=prune_unet", f"root={tmp_path}", *own, *tiny_model)
    assert refused.returncode == 1 and f"recovery_steps=2: {why}" in refused.stderr


def test_the_benchmark_reads_them_as_predictors(finished, tmp_path):
    file = finished[0] / "round-00/scores.json"
    rows = json.loads(file.read_text())["sites"]
    found = recovered_predictors(file, [*rows])
    assert found["sum of CLIP lost after local recovery"] == {block: row["delta_clip"] for block, row in rows.items()}
    assert all(value >= 0 for value in found["sum of errors that a linear map leaves"].values())
    values = [BlockValue(block, row["delta_clip"], row["se"], 1.0) for block, row in rows.items()]
    every = block_predictors(finished[0], values, None, file)
    assert every.keys() - block_predictors(finished[0], values, None).keys() == found.keys()
    first = next(iter(rows))
    with pytest.raises(ValueError, match="--recovered-scores .* no score after local recovery of .'not there'."):
        recovered_predictors(file, [first, "not there"])
    del rows[first]["before_recovery"]
    (tmp_path / "plain.json").write_text(json.dumps({"sites": rows}))
    with pytest.raises(ValueError, match=f"recovery of ..{first}"):
        recovered_predictors(tmp_path / "plain.json", [first])
