"""Objectives that train networks beside the student: each has its optimiser, and a kill changes none of them."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

from slimstep.engine.config import TrainConfig
from slimstep.engine.loop import StepBatches, train
from slimstep.engine.objective import STUDENT, Requirements, as_objective, check_requirements
from slimstep.engine.run import Run
from tests.engine.test_loop import Killed, Points, denoise, run_once
from tests.engine.two_networks import FakeScore, network
from tests.tiny import slow

CONFIG = TrainConfig(
    steps=12, batch_size=4, checkpoint_every=5, log_every=4, warmup_steps=2, learning_rate=1e-2,
    learning_rates={"fake_score": 3e-3},
)  # fmt: skip


def run_two(path, config=CONFIG, objective=None, precision="no"):
    """The student and the network beside it, trained."""
    AcceleratorState._reset_state(True)
    accelerator, objective = Accelerator(cpu=True, mixed_precision=precision), objective or FakeScore()
    try:
        student = train(network(seed=0), objective, Points(), config, Run(path, accelerator, seed=3), "stage")
    finally:
        accelerator.free_memory()
    return student, objective.networks["fake_score"]


class Mortal(FakeScore):
    """Dies at its n-th loss."""

    def __init__(self, call):
        super().__init__()
        self.left = call

    def loss(self, *args):
        self.left -= 1
        if not self.left:
            raise Killed
        return super().loss(*args)


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    "changes",
    [{}, *slow({"accumulation": 2, "workers": 1}, {"optimizer": "adafactor", "ema_decay": 0.0})],
    ids=["plain", "accumulation", "adafactor"],
)
def test_a_killed_run_of_two_networks_equals_an_uninterrupted_one(tmp_path, changes):
    config = TrainConfig(**{**vars(CONFIG), **changes})
    quiet = run_two(tmp_path / "quiet", config)
    for call in (4, 20, 14):  # before the first checkpoint, after it, after the second
        with pytest.raises(Killed):
            run_two(tmp_path / "killed", config, Mortal(call * config.accumulation))
    continued = run_two(tmp_path / "killed", config)
    assert all(same(ours, theirs) for ours, theirs in zip(quiet, continued, strict=True))
    assert (tmp_path / "quiet/metrics.jsonl").read_text() == (tmp_path / "killed/metrics.jsonl").read_text()


def test_every_network_learns_at_its_own_rate_in_its_own_updates(tmp_path):
    before, updates = FakeScore().networks["fake_score"], []

    class Watching(FakeScore):
        def loss(self, networks, batch, generator, update):
            learning = {name: {p.requires_grad for p in n.parameters()} for name, n in networks.items()}
            updates.append((update, [name for name, wants in learning.items() if wants == {True}]))
            return super().loss(networks, batch, generator, update)

    student, fake_score = run_two(tmp_path, objective=Watching())
    assert all(learning == [update] for update, learning in updates)  # no gradient in the network of another update
    assert [update for update, _ in updates[:7]] == ["fake_score", "fake_score", STUDENT] * 2 + ["fake_score"]
    assert not same(fake_score, before) and {p.requires_grad for p in fake_score.parameters()} == {True}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "noise", "grad_norm", "lr", "fake_score/loss", "fake_score/size", "fake_score/grad_norm"} < set(
        rows[0]
    )
    assert all(row["fake_score/lr"] == pytest.approx(0.3 * row["lr"]) for row in rows)


def test_the_step_of_a_loss_that_is_not_finite_is_kept_with_the_samples_of_all_its_updates(tmp_path):
    class Diverging(FakeScore):
        def loss(self, networks, batch, generator, update):
            loss, metrics = super().loss(networks, batch, generator, update)
            return loss * (float("nan") if update == "fake_score" and batch["progress"] > 0.4 else 1), metrics

    with pytest.raises(FloatingPointError, match="not finite at step 6"):
        run_two(tmp_path, objective=Diverging())
    kept = torch.load(tmp_path / "stage/not-finite-step-00000006-rank-0.pt")
    assert [len(samples) for samples in kept["samples"]] == [4, 4, 4]


def test_updates_take_new_samples_and_two_processes_take_what_one_takes():
    def updates(step):
        return len(FakeScore().updates(step))

    one = list(StepBatches(37, TrainConfig(steps=6, batch_size=4, accumulation=2), 1, 0, 0, 1, updates))
    two = [StepBatches(37, TrainConfig(steps=6, batch_size=4), 1, 0, rank, 2, updates) for rank in range(2)]
    assert one == [batch for pair in zip(*two, strict=True) for batch in pair]
    assert len(one) == 2 * (3 + 3 + 3 + 1 + 3 + 3) and one[0] != one[2]
    assert one[-6:] == list(StepBatches(37, TrainConfig(steps=6, batch_size=4, accumulation=2), 1, 5, 0, 1, updates))


class Falling:
    """Finds a student better the smaller its first weight is, and in the second half of the training no longer."""

    best_by = "score"

    def __call__(self, student, step):
        self.seen = {**getattr(self, "seen", {}), step: copy.deepcopy(student.state_dict())}
        return {"score": -float(step) if step > 4 else float(step)}


def run_watched(path, monitor, config, objective=None):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    try:
        run = Run(path, accelerator, seed=3)
        return train(network(seed=0), objective or FakeScore(), Points(), config, run, "stage", monitor)
    finally:
        accelerator.free_memory()


def test_the_best_weights_are_kept_and_looking_changes_nothing(tmp_path):
    watching = TrainConfig(**{**vars(CONFIG), "evaluate_every": 2})
    plain, _ = run_two(tmp_path / "plain")
    monitor = Falling()
    watched = run_watched(tmp_path / "watched", monitor, watching)
    assert same(plain, watched) and sorted(monitor.seen) == [*range(2, CONFIG.steps + 1, 2)]
    best = run_watched(tmp_path / "best", Falling(), TrainConfig(**{**vars(watching), "keep_best": True}))
    assert all(torch.equal(value, monitor.seen[4][name]) for name, value in best.state_dict().items())
    rows = [json.loads(line) for line in (tmp_path / "best/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "calibration/score" in row] == sorted(monitor.seen)
    assert json.loads((tmp_path / "best/stage/best.json").read_text()) == {"step": 4, "value": 4.0, "metric": "score"}


def test_a_killed_training_keeps_the_best_weights_of_a_quiet_one(tmp_path):
    config = TrainConfig(**{**vars(CONFIG), "evaluate_every": 2, "keep_best": True})
    quiet = run_watched(tmp_path / "quiet", Falling(), config)
    for call in (4, 20, 14):
        with pytest.raises(Killed):
            run_watched(tmp_path / "killed", Falling(), config, Mortal(call))
    continued = run_watched(tmp_path / "killed", Falling(), config)
    assert same(quiet, continued)
    assert (tmp_path / "quiet/metrics.jsonl").read_text() == (tmp_path / "killed/metrics.jsonl").read_text()


def test_what_nothing_looks_at_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train.evaluate_every=2 is for the stages of a distillation"):
        run_watched(tmp_path, None, TrainConfig(**{**vars(CONFIG), "evaluate_every": 2}))
    with pytest.raises(ValueError, match="train.keep_best=true needs train.evaluate_every"):
        TrainConfig(keep_best=True)


def test_a_metric_beyond_its_limits_stops_the_training_and_names_the_last_good_checkpoint(tmp_path):
    class Limited(FakeScore):
        requires = replace(FakeScore.requires, limits={"noise": (1.0, 2.0)})

    with pytest.raises(FloatingPointError, match="'stage' diverged by step .*noise=.* is not within 1 and 2"):
        run_two(tmp_path, objective=Limited())


def test_in_half_precision_both_networks_come_out_bare(tmp_path):
    trained = run_two(tmp_path, TrainConfig(**{**vars(CONFIG), "steps": 3}), precision="bf16")
    x = torch.randn(4, 3)
    assert all(torch.equal(net.eval()(x), nn.Sequential.forward(net, x)) for net in trained)


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    with pytest.raises(Killed):
        run_two(tmp_path, objective=Mortal(18))
    config = TrainConfig(**{**vars(CONFIG), "learning_rates": None})
    with pytest.raises(ValueError, match=r"holds the networks \['student', 'fake_score'\].*trains \['student'\]"):
        run_once(tmp_path, config)


def test_a_plain_callable_is_an_objective_of_the_student_alone():
    objective = as_objective(denoise)
    assert (dict(objective.networks), objective.requires) == ({}, Requirements())
    assert {objective.updates(step) for step in range(5)} == {(STUDENT,)}
    assert as_objective(objective) is objective


def test_what_cannot_be_trained_is_refused_by_name():
    alone, sharing = (SimpleNamespace(distributed_type=kind) for kind in (DistributedType.NO, DistributedType.FSDP))
    check_requirements(FakeScore(), CONFIG, alone)
    with pytest.raises(ValueError, match="training fake_score beside the student does not go with FSDP"):
        check_requirements(FakeScore(), CONFIG, sharing)
    with pytest.raises(ValueError, match=r"learning_rates names \['critic'\]; FakeScore trains fake_score beside"):
        check_requirements(FakeScore(), TrainConfig(learning_rates={"critic": 1e-4}), alone)
    with pytest.raises(ValueError, match=r"learning_rates.critic=0.0 must be above 0"):
        TrainConfig(learning_rates={"critic": 0.0})

    def hooked(network, batch, generator): ...

    hooked.requires = Requirements(feature_hooks=True)
    with pytest.raises(ValueError, match="reads features with hooks: its train.compile must be false"):
        check_requirements(hooked, TrainConfig(compile=True), alone)
