"""The dry run can fail: what a GPU refuses raises, what it does passes, and what it waits for is counted."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.cuda_dry_run.mode import DeviceFault


def network():
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize(
    "mix",
    [
        lambda net, x: net(x.cpu()),
        lambda net, x: net(x) + torch.ones(2, 4, 8, 8),
        lambda net, x: torch.cat([x, torch.ones(2, 4, 8, 8)]),
        lambda net, x: torch.where(torch.ones(2, 1, 1, 1, dtype=torch.bool), x, 0),
        lambda net, x: torch.ones(8)[torch.zeros(2, dtype=torch.long, device="cuda")],
        lambda net, x: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda net, x: torch.randn(3, generator=torch.Generator("cuda")),
    ],
    ids=["input", "sum", "cat", "where", "index of a CPU tensor", "generator of the CPU", "generator of the GPU"],
)
def test_mixed_devices_raise(gpu, mix):
    net, x = network().to("cuda"), torch.randn(2, 4, 8, 8, device="cuda")
    net(x).mean().backward()
    with pytest.raises(DeviceFault, match="device"):
        mix(net, x)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: nn.Conv2d(4, 4, 1, device="cuda")(x.half()[None]),
        lambda x: x.bfloat16() @ x.transpose(1, 2),
        lambda x: nn.functional.linear(x.half(), torch.ones(3, 8, device="cuda")),
        lambda x: nn.LayerNorm(8, device="cuda")(x.bfloat16()),
        lambda x: nn.GroupNorm(2, 4, device="cuda")(x.bfloat16()[None]),
        lambda x: nn.functional.scaled_dot_product_attention(x, x.half(), x),
    ],
    ids=["convolution", "product", "linear", "layer norm", "group norm", "attention"],
)
def test_mixed_dtypes_raise_and_under_autocast_they_do_not(gpu, mix):
    x = torch.randn(4, 8, 8, device="cuda")
    with pytest.raises(RuntimeError, match="type"):
        mix(x)
    with torch.autocast("cuda", torch.bfloat16):
        mix(x)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: x[[0, 1]],
        lambda x: x.copy_(torch.ones(4, 4)),
        lambda x: x[0].__setitem__(0, 1.0),
        lambda x: torch.ones(4, 4).to("cuda"),
    ],
    ids=["item", "cpu", "bool", "nonzero", "tensor", "list index", "copy_", "a number set", "to"],
)
def test_a_wait_is_counted_and_raises_under_capture_and_in_sync_debug_mode(gpu, wait):
    x = torch.randn(4, 4, device="cuda")
    with gpu.counted() as waits:
        wait(x)
    assert sum(waits.values()) >= 1 and all(place.startswith("tests/") is False for place in waits)
    with pytest.raises(DeviceFault, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        wait(x)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(DeviceFault, match="called a synchronizing CUDA operation"):
        wait(x)


def test_what_does_not_wait_is_not_counted(gpu):
    net, x, pinned = network().to("cuda"), torch.randn(2, 4, 8, 8, device="cuda"), torch.ones(2, 4, 8, 8).pin_memory()
    with gpu.counted() as waits:
        loss = (net(x + 1).float() * torch.tensor(2.0)).mean()
        loss.backward()
        pinned.to("cuda", non_blocking=True)
        x[:1] = 0.0
    assert not waits


def test_a_graph_that_was_not_captured_does_not_replay(gpu):
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(DeviceFault, match="capturing"), torch.cuda.graph(graph):
        torch.ones(1, device="cuda").item()
    with pytest.raises(DeviceFault, match="replay"):
        graph.replay()


def test_an_optimizer_made_before_the_move_trains_the_moved_parameters(gpu):
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    net.to("cuda")
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], net.parameters(), strict=True))
    net(torch.randn(2, 4, 8, 8, device="cuda")).mean().backward()
    optimizer.step()
    assert {state["exp_avg"].device.type for state in optimizer.state.values()} == {"cuda"}


def test_copies_to_the_host_are_zeros_and_files_come_back(gpu, tmp_path):
    net = network().to("cuda")
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    torch.save(copy.deepcopy(net).state_dict(), tmp_path / "net.pt")
    states = load_file(tmp_path / "net.safetensors"), torch.load(tmp_path / "net.pt", weights_only=True)
    for state in states:
        assert state.keys() == net.state_dict().keys()
        assert all(x.device.type == "cpu" and not x.any() for x in state.values())
        net.load_state_dict(state)
    on_gpu = load_file(tmp_path / "net.safetensors", device="cuda:0")
    assert {x.device.type for x in on_gpu.values()} == {"cuda"}


def test_afterwards_there_is_no_device():
    from tests.cuda_dry_run.device import cuda_dry_run

    real = torch.cuda.is_available(), torch.Generator, torch.Tensor.to, torch.load, torch.compile
    with cuda_dry_run():
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert (torch.cuda.is_available(), torch.Generator, torch.Tensor.to, torch.load, torch.compile) == real
    weight = nn.Parameter(torch.ones(2))
    weight.sum().backward()
    assert torch.equal(weight.grad, torch.ones(2))
