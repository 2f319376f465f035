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


# What two processes learn in shards, and one process by twice the accumulation: {network: (options, doubled)}.
SHARDED = {
    "sdxl": (["steps=3", "gradient_checkpointing=true"], ["accumulation=2"]),
    "decoder": (["steps=3"], ["accumulation=2"]),
    "recovery": (["steps=3", "accumulation=2"], ["accumulation=4"]),
}
SEVERAL = ("two", "dmd")  # networks in one training
KILLED = [("decoder", "fsdp"), ("two", "ddp"), ("dmd", "ddp")]


def launch(way, precision, *trainings):
    """Trains in turn, (root, network, *options) each, in one process or two; how it ended."""
    launcher = [] if way == "plain" else TORCHRUN
    words = [word for training in trainings for word in ("--", *map(str, training))][1:]
    command = [sys.executable, *launcher, "-m", "tests.engine.sharded", way, precision, *words]
    on_cpu = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=ROOT, env=on_cpu, capture_output=True, text=True)


def weights(root):
    return load_file(root / "stage/weights.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of all trainings that nothing disturbs, WAY/NETWORK each, and FSDP2's of three steps in `sharded`."""
    root = tmp_path_factory.mktemp("trained")
    one = [(root / "plain" / name, name, *options, *doubled) for name, (options, doubled) in SHARDED.items()]
    sharded = [(root / "sharded" / name, name, *options) for name, (options, _) in SHARDED.items()]
    for way, trainings in {
        "plain": [*one, *((root / "plain" / name, name, "accumulation=2") for name in SEVERAL)],
        "fsdp": [*sharded, (root / "fsdp/decoder", "decoder")],
        "ddp": [(root / "ddp" / name, name) for name in SEVERAL],
    }.items():
        done = launch(way, "no", *trainings)
        assert done.returncode == 0, done.stderr
    return root


@pytest.mark.slow
@pytest.mark.parametrize("network", SHARDED)
def test_shards_train_to_the_weights_of_one_process(trained, network):
    ours, theirs = (weights(trained / way / network) for way in ("sharded", "plain"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERAL)
def test_several_networks_train_in_two_processes_to_the_weights_of_one(trained, name):
    ours, theirs = (weights(trained / way / name) for way in ("ddp", "plain"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "way"), KILLED)
def test_a_killed_training_of_two_ranks_ends_with_the_bits_of_a_quiet_one(trained, tmp_path, network, way):
    """Weights, optimizer states and EMA come back, from their shards or rank after rank."""
    root = tmp_path / "killed"
    assert launch(way, "no", (root, network, "kill_at=5")).returncode != 0
    (last, *_) = sorted((root / "stage/checkpoints").iterdir(), reverse=True)
    assert last.name == "step-00000004" and (last / "ema.pt").is_file()
    assert (last / "pytorch_model_fsdp_0").is_dir() == (way == "fsdp")
    continued = launch(way, "no", (root, network))
    assert continued.returncode == 0, continued.stderr
    ours, theirs = weights(trained / way / network), weights(root)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "ddp"])
def test_a_compiled_training_in_half_precision_leaves_the_names_and_the_network_as_they_were(tmp_path, way):
    eager = tmp_path / "eager", "sdxl", "steps=2"
    compiled = tmp_path / "compiled", "sdxl", "steps=2", "compile=true"
    done = launch(way, "bf16", eager, compiled, compiled)  # the second time its finished weights are read
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(weights(tmp_path / "compiled"), weights(tmp_path / "eager"), rtol=1e-3, atol=1e-5)


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
