"""FSDP2, DDP and compiling on a CPU, in two processes: finished weights are those of one process, in one piece."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn

from slimstep.engine.config import TrainConfig
from slimstep.engine.sharding import check_sharding, copy_to_shard, with_room

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(root, network, way, *overrides):
    launcher = [] if way == "plain" else TORCHRUN
    command = [sys.executable, *launcher, "-m", "tests.engine.sharded", str(root), network, way, *overrides]
    on_cpu = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=ROOT, env=on_cpu, capture_output=True, text=True)


def weights(root):
    return load_file(root / "stage/weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "more"),
    [("sdxl", ["gradient_checkpointing=true"]), ("decoder", []), ("recovery", ["accumulation=2"])],
    ids=["sdxl", "decoder", "recovery"],
)
def test_shards_train_to_the_weights_of_one_process(tmp_path, network, more):
    accumulation = "accumulation=4" if "accumulation=2" in more else "accumulation=2"
    one = run(tmp_path / "one", network, "plain", "steps=3", *more, accumulation)
    two = run(tmp_path / "two", network, "fsdp", "steps=3", *more)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_networks_train_in_two_processes_to_the_weights_of_one(tmp_path):
    one = run(tmp_path / "one", "two", "plain", "steps=6", "accumulation=2")
    two = run(tmp_path / "two", "two", "ddp", "steps=6")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "way"), [("decoder", "fsdp"), ("decoder", "ddp"), ("two", "ddp")])
def test_a_killed_training_of_two_ranks_ends_with_the_bits_of_a_quiet_one(tmp_path, network, way):
    """Weights, optimizer states and EMA come back, from their shards or rank after rank."""
    assert run(tmp_path / "quiet", network, way).returncode == 0
    assert run(tmp_path / "killed", network, way, "kill_at=5").returncode != 0
    (last, *_) = sorted((tmp_path / "killed/stage/checkpoints").iterdir(), reverse=True)
    assert last.name == "step-00000004" and (last / "ema.pt").is_file()
    assert (last / "pytorch_model_fsdp_0").is_dir() == (way == "fsdp")
    continued = run(tmp_path / "killed", network, way)
    assert continued.returncode == 0, continued.stderr
    ours, theirs = weights(tmp_path / "quiet"), weights(tmp_path / "killed")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "ddp"])
def test_a_compiled_training_in_half_precision_leaves_the_names_and_the_network_as_they_were(tmp_path, way):
    eager = run(tmp_path / "eager", "sdxl", way, "steps=2", "precision=bf16")
    compiled = run(tmp_path / "compiled", "sdxl", way, "steps=2", "precision=bf16", "compile=true")
    assert eager.returncode == compiled.returncode == 0, eager.stderr + compiled.stderr
    torch.testing.assert_close(weights(tmp_path / "compiled"), weights(tmp_path / "eager"), rtol=1e-3, atol=1e-5)
    again = run(tmp_path / "compiled", "sdxl", way, "steps=2", "precision=bf16", "compile=true")
    assert again.returncode == 0, again.stderr  # its finished weights are read


def test_a_network_that_is_sharded_gives_its_weights_away_and_gets_room_for_them():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    before, names = dict(model.named_parameters()), list(model.state_dict())
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    copied = copy_to_shard(model, SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert all(parameter is before[name] for name, parameter in copied.named_parameters())  # none lies there twice
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert copied[1].running_mean is not model[1].running_mean
    with_room(model, torch.device("cpu")).load_state_dict(copied.state_dict())
    assert list(model.state_dict()) == names and not model[0].bias.requires_grad and model[0].weight.requires_grad
    x = torch.randn(5, 3)
    assert torch.equal(model(x), copied(x)) and model[0].weight is not copied[0].weight


CANNOT = [({"optimizer": "adafactor"}, "choose adamw8bit"), ({"compile": True}, "does not go with FSDP")]


@pytest.mark.parametrize(("requested", "message"), CANNOT)
def test_what_cannot_be_sharded_is_an_error(requested, message):
    alone, sharing = (SimpleNamespace(distributed_type=kind) for kind in (DistributedType.NO, DistributedType.FSDP))
    check_sharding(TrainConfig(**requested), alone)
    with pytest.raises(ValueError, match=message):
        check_sharding(TrainConfig(**requested), sharing)
