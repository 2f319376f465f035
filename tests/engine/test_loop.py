"""The training loop: what a kill, accumulation or a second process may not change."""

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import slimstep.engine.ema as ema_module
from slimstep.engine.checkpoints import EMA_WEIGHTS, FIRST_EMA_WEIGHTS, FORMER_EMA_WEIGHTS, Checkpoints
from slimstep.engine.config import OPTIMIZERS, TrainConfig
from slimstep.engine.ema import DeviceEMA
from slimstep.engine.loop import StepBatches, learning_rate_at, train
from slimstep.engine.preemption import CONTINUE_ME, Preempted, leave_on_sigterm
from slimstep.engine.run import Run
from slimstep.engine.seeding import seed_of


class Points(torch.utils.data.Dataset):
    """37 points: not a multiple of any batch size, so epochs end inside batches."""

    def __len__(self):
        return 37

    def __getitem__(self, index):
        return {"x": torch.full((3,), index / 37)}


class Killed(Exception):
    pass


def denoise(model, batch, generator):
    noise = torch.randn(batch["x"].shape, generator=generator)
    return (model(batch["x"] + noise) - batch["x"]).square().mean(), {"noise": noise.mean()}


def run_once(path, config, objective=denoise, precision="no", width=8):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, width), nn.Linear(width, 3))
    try:
        return train(model, objective, Points(), config, Run(path, accelerator, seed=3), "stage")
    finally:
        accelerator.free_memory()


def killed_at(call):
    """An objective that dies at its n-th call."""
    calls = iter(range(1, 10_000))

    def objective(*args):
        if next(calls) == call:
            raise Killed
        return denoise(*args)

    return objective


CONFIG = TrainConfig(steps=30, batch_size=4, checkpoint_every=7, log_every=5, warmup_steps=2, learning_rate=1e-2)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, accumulation, workers):
    config = TrainConfig(**{**vars(CONFIG), "accumulation": accumulation, "workers": workers})
    quiet = run_once(tmp_path / "quiet", config)
    for call in (3, 20, 12):
        with pytest.raises(Killed):
            run_once(tmp_path / "killed", config, killed_at(call * accumulation))
    continued = run_once(tmp_path / "killed", config)
    for ours, theirs in zip(quiet.parameters(), continued.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert (tmp_path / "quiet/metrics.jsonl").read_text() == (tmp_path / "killed/metrics.jsonl").read_text()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns_and_goes_on_where_it_was(tmp_path, optimizer):
    if optimizer == "adamw8bit":
        pytest.importorskip("torchao")
    config = TrainConfig(**{**vars(CONFIG), "optimizer": optimizer, "learning_rate": 3e-3, "log_every": 1})
    quiet = run_once(tmp_path / "quiet", config, width=64)  # 64 x 64 weights are enough to be kept in 8 bits
    with pytest.raises(Killed):
        run_once(tmp_path / "killed", config, killed_at(18), width=64)
    continued = run_once(tmp_path / "killed", config, width=64)
    assert all(torch.equal(a, b) for a, b in zip(quiet.parameters(), continued.parameters(), strict=True))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "quiet/metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_an_ema_is_that_of_its_definition():
    weights = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    ema, expected = DeviceEMA(weights, decay=0.9), [w.detach().clone() for w in weights]
    for step in range(20):
        for weight in weights:
            weight.data.normal_()
        ema.step(weights)
        decay = min(0.9, (1 + step) / (10 + step)) if step else 0.0
        expected = [decay * e + (1 - decay) * w.detach() for e, w in zip(expected, weights, strict=True)]
    torch.testing.assert_close(ema.shadow_params, expected)


def test_a_rank_that_writes_no_checkpoint_gathers_the_ema_and_keeps_none_of_it(monkeypatch):
    weights = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    ema, requested = DeviceEMA(weights, decay=0.9), []
    monkeypatch.setattr(ema_module, "whole", lambda *args, real=ema_module.whole: requested.append(args) or real(*args))
    assert ema.state_dict(keep=False)["shadow_params"] == [] and len(requested) == 2  # it gave its shard of each
    kept = ema.state_dict(keep=True)
    assert all(torch.equal(a, b) for a, b in zip(kept["shadow_params"], weights, strict=True))


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_is_asked_for_the_ema_and_one_keeps_and_writes_it(tmp_path, rank):
    ema, requested = DeviceEMA([nn.Parameter(torch.randn(3))], decay=0.9), []
    ema.state_dict = lambda keep, real=ema.state_dict: requested.append(keep) or real(keep)
    Checkpoints(tmp_path, 1, SimpleNamespace(is_main_process=rank == 0), ema).save_ema(tmp_path / EMA_WEIGHTS)
    assert requested == [rank == 0] and (tmp_path / EMA_WEIGHTS).exists() == (rank == 0)


def test_an_ema_is_read_into_the_memory_that_it_had():
    weights, others = ([nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))] for _ in range(2))
    ema, saved = DeviceEMA(weights, decay=0.9), DeviceEMA(others, decay=0.9)
    saved.step(others)
    places = [weight.data_ptr() for weight in ema.shadow_params]
    ema.load_state_dict(saved.state_dict())
    assert [weight.data_ptr() for weight in ema.shadow_params] == places and ema.optimization_step == 1
    torch.testing.assert_close(ema.shadow_params, saved.shadow_params, rtol=0, atol=0)
    with pytest.raises(AssertionError, match=r"EMA weights of \(1,\) for \(5,\)"):  # which would spread over all five
        ema.load_state_dict({**saved.state_dict(), "shadow_params": [torch.zeros(3, 4), torch.zeros(1)]})


@pytest.mark.parametrize("former", [FORMER_EMA_WEIGHTS, FIRST_EMA_WEIGHTS])
def test_a_checkpoint_whose_ema_has_a_former_name_goes_on(tmp_path, former):
    quiet = run_once(tmp_path / "quiet", CONFIG)
    with pytest.raises(Killed):
        run_once(tmp_path / "killed", CONFIG, killed_at(20))
    newest = tmp_path / "killed/stage/checkpoints/step-00000014"
    (newest / EMA_WEIGHTS).rename(newest / former)
    made_by = json.loads((newest / "made_by.json").read_text())
    made_by["files"][former] = made_by["files"].pop(EMA_WEIGHTS)
    (newest / "made_by.json").write_text(json.dumps(made_by))
    seen = []
    continued = run_once(tmp_path / "killed", CONFIG, lambda *args: seen.append(args) or denoise(*args))
    assert len(seen) == 30 - 14
    assert all(torch.equal(a, b) for a, b in zip(quiet.parameters(), continued.parameters(), strict=True))


def test_a_finished_stage_is_loaded_and_not_trained_again(tmp_path):
    first = run_once(tmp_path, CONFIG)
    second = run_once(tmp_path, CONFIG, killed_at(1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_two_processes_take_what_one_takes_with_twice_the_accumulation():
    one = StepBatches(37, TrainConfig(steps=6, batch_size=4, accumulation=2), seed=1, first_step=0, rank=0, world=1)
    two = [StepBatches(37, TrainConfig(steps=6, batch_size=4), 1, 0, rank, 2) for rank in range(2)]
    assert list(one) == [batch for pair in zip(*two, strict=True) for batch in pair]


def test_a_network_just_trained_computes_as_one_read_from_its_file(tmp_path):
    """Accelerate leaves an autocast wrapper on what it prepared in mixed precision."""
    x = torch.randn(4, 3)
    config = TrainConfig(**{**vars(CONFIG), "steps": 2})
    just_trained = run_once(tmp_path, config, precision="bf16")(x)
    read = run_once(tmp_path, config, precision="bf16")(x)
    assert just_trained.dtype == torch.float32 and torch.equal(just_trained, read)


def test_an_epoch_shows_every_sample_once():
    batches = StepBatches(37, TrainConfig(steps=37, batch_size=4), seed=1, first_step=0, rank=0, world=1)
    stream = [index for batch in batches for index in batch]
    assert sorted(stream[:37]) == sorted(stream[37:74]) == list(range(37))
    assert stream[:37] != stream[37:74]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    with pytest.raises(Killed):
        run_once(tmp_path, CONFIG, killed_at(29))
    assert sorted(p.name for p in (tmp_path / "stage/checkpoints").iterdir()) == ["step-00000021", "step-00000028"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    calls = iter(range(1, 10_000))

    def diverging(model, batch, generator):
        loss, metrics = denoise(model, batch, generator)
        return loss * (float("nan") if next(calls) > 10 else 1), metrics

    with pytest.raises(FloatingPointError, match=r"not finite at step 11.*learning_rate.*checkpoints"):
        run_once(tmp_path, CONFIG, diverging)
    assert [p.name for p in (tmp_path / "stage/checkpoints").iterdir()] == ["step-00000007"]
    kept = torch.load(tmp_path / "stage/not-finite-step-00000011-rank-0.pt")
    eleventh = list(StepBatches(37, CONFIG, seed_of(3, "stage"), 0, rank=0, world=1))[10]
    assert kept["samples"] == [eleventh]
    torch.testing.assert_close(kept["batches"][0]["x"][:, 0], torch.tensor(eleventh) / 37)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "ema.pt", "made_by.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog, name, damage):
    quiet = run_once(tmp_path / "quiet", CONFIG)
    with pytest.raises(Killed):
        run_once(tmp_path / "killed", CONFIG, killed_at(20))
    newest = tmp_path / "killed/stage/checkpoints/step-00000014"
    tear(newest / name, damage)
    seen = []

    def watching(*args):
        seen.append(args)
        return denoise(*args)

    continued = run_once(tmp_path / "killed", CONFIG, watching)
    assert len(seen) == 30 - 7 and "step-00000014 is torn" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(quiet.parameters(), continued.parameters(), strict=True))


def tear(path, damage):
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :])


@pytest.fixture
def handlers():
    """Signal handlers as they were before the test."""
    before = {target: signal.getsignal(target) for target in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for target, handler in before.items():
        signal.signal(target, handler)


def signalled(step, *sent):
    calls = iter(range(1, 10_000))

    def objective(*args):
        if next(calls) == step:
            for signum in sent:
                os.kill(os.getpid(), signum)
        return denoise(*args)

    return objective


def test_sigterm_leaves_a_checkpoint_at_the_next_logged_step(tmp_path, handlers):
    leave_on_sigterm()
    quiet = run_once(tmp_path / "quiet", CONFIG)
    with pytest.raises(Preempted) as leaving:
        run_once(tmp_path / "preempted", CONFIG, signalled(16, signal.SIGTERM))
    assert leaving.value.code == CONTINUE_ME
    assert (tmp_path / "preempted/stage/checkpoints/step-00000020").exists()
    continued = run_once(tmp_path / "preempted", CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(quiet.parameters(), continued.parameters(), strict=True))
    assert (tmp_path / "quiet/metrics.jsonl").read_text() == (tmp_path / "preempted/metrics.jsonl").read_text()


def test_sigterm_in_the_last_steps_leaves_with_the_finished_weights(tmp_path, handlers):
    leave_on_sigterm()
    with pytest.raises(Preempted):
        run_once(tmp_path, CONFIG, signalled(29, signal.SIGTERM))
    assert sorted(os.listdir(tmp_path / "stage")) == ["weights.safetensors"]


def test_what_fails_after_sigterm_is_laid_to_it(tmp_path, handlers, caplog):
    """A neighbour that left first, for one."""
    leave_on_sigterm()
    signals = signalled(16, signal.SIGTERM)

    def deserted(*args):
        loss = signals(*args)
        if next(steps) == 18:
            raise RuntimeError("Connection closed by peer")
        return loss

    steps = iter(range(1, 10_000))
    with pytest.raises(Preempted):
        run_once(tmp_path, CONFIG, deserted)
    assert "after SIGTERM: RuntimeError: Connection closed by peer" in caplog.text


def test_a_signal_that_its_handler_lets_pass_changes_nothing(tmp_path, handlers):
    """As submitit's does with SIGTERM; its SIGUSR2 finds a checkpoint before the job goes back into the queue."""
    heard = []
    for target in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(target, lambda signum, frame: heard.append((signum, checkpoint.exists())))
    checkpoint = tmp_path / "signalled/stage/checkpoints/step-00000020"
    quiet = run_once(tmp_path / "quiet", CONFIG)
    gone_on = run_once(tmp_path / "signalled", CONFIG, signalled(16, signal.SIGTERM, signal.SIGUSR2))
    assert sorted(heard) == [(signal.SIGUSR2, True), (signal.SIGTERM, True)]
    assert all(torch.equal(a, b) for a, b in zip(quiet.parameters(), gone_on.parameters(), strict=True))


def test_a_checkpoint_of_other_processes_is_refused(tmp_path):
    with pytest.raises(Killed):
        run_once(tmp_path, CONFIG, killed_at(10))
    (made_by,) = tmp_path.glob("stage/checkpoints/step-*/made_by.json")
    made_by.write_text(json.dumps({**json.loads(made_by.read_text()), "processes": 3}))
    with pytest.raises(ValueError, match=r"made by 3 process.*this is 1"):
        run_once(tmp_path, CONFIG)


def test_the_learning_rate_warms_up_and_follows_a_cosine_to_zero():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    assert learning_rate_at(0, config) == pytest.approx(0.1)
    assert learning_rate_at(50, config) == pytest.approx(0.5)
    assert learning_rate_at(100, config) == pytest.approx(0.0)


LOW_RANK = replace(CONFIG, lora_rank=2, steps=12)


def test_a_low_rank_update_is_all_that_is_trained(tmp_path):
    before = run_once(tmp_path / "none", replace(LOW_RANK, learning_rate=1e-30)).state_dict()
    trained = run_once(tmp_path / "some", LOW_RANK).state_dict()
    assert before.keys() == trained.keys()
    for name, weight in trained.items():
        difference = weight - before[name]
        if difference.ndim == 2:
            assert 1 <= torch.linalg.matrix_rank(difference, atol=1e-6) <= 2
        else:
            assert difference.abs().max() == 0, name


def test_a_low_rank_training_survives_a_kill(tmp_path):
    whole = run_once(tmp_path / "whole", LOW_RANK)
    with pytest.raises(Killed):
        run_once(tmp_path / "killed", LOW_RANK, killed_at(9))
    resumed = run_once(tmp_path / "killed", LOW_RANK)
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert all(parameter.requires_grad for parameter in resumed.parameters())


def test_a_finished_low_rank_training_is_loaded(tmp_path):
    first, second = run_once(tmp_path, LOW_RANK), run_once(tmp_path, LOW_RANK)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert [name for name, _ in first.named_modules()] == [name for name, _ in second.named_modules()]
