"""Timing by CUDA graphs, on a device that is acted: what is captured, what is refused before, what the table says."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import slimstep.eval.timing.latency as latency
from slimstep.eval.config import LatencyConfig
from slimstep.eval.timing.graphs import WARMUP, CannotCaptureError, CapturedCall
from slimstep.eval.timing.latency import compare_ms, forward_call, settled_launch
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.prune.latency import method_of
from tests.tiny import small_unet

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FEW = LatencyConfig(warmup=1, iterations=3, text_length=5)


class ActedDevice:
    """What torch.cuda has for a capture: it notes calls, and what mode they find."""

    def __init__(self, monkeypatch):
        self.mode, self.capturing, self.seen, self.replays = 0, False, [], 0
        stream = SimpleNamespace(wait_stream=lambda other: None)
        acted = {
            "Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda s: nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay), "graph": lambda graph: self,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }  # fmt: skip
        for name, function in acted.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def __enter__(self):
        self.capturing = True

    def __exit__(self, *_):
        self.capturing = False

    def replay(self):
        self.replays += 1

    def call(self):
        self.seen.append("captured" if self.capturing else self.mode)

    def waiting_call(self):
        """One that copies to the host."""
        self.call()
        if self.mode == "error" or self.capturing:
            raise RuntimeError("called a synchronizing CUDA operation\nand more lines")


@pytest.fixture
def device(monkeypatch):
    return ActedDevice(monkeypatch)


def test_a_call_is_warmed_up_watched_for_waits_captured_and_from_then_on_replayed(device):
    captured = CapturedCall(device.call)
    assert device.seen == [0] * WARMUP + ["error", "captured"] and device.mode == 0
    for _ in range(5):
        captured()
    assert device.replays == 5 and device.seen[-1] == "captured" and len(device.seen) == WARMUP + 2


def test_a_call_that_waits_is_refused_before_anything_is_captured(device):
    with pytest.raises(CannotCaptureError, match="synchronizing CUDA operation$"):
        CapturedCall(device.waiting_call)
    assert "captured" not in device.seen and device.mode == 0


@pytest.fixture(scope="module")
def unet():
    return PrunableUNet2DConditionModel.from_unet(small_unet())


@pytest.fixture
def captures(monkeypatch):
    """The calls that are captured; they run eagerly here."""
    made = []
    monkeypatch.setattr(latency, "CapturedCall", lambda call: made.append(call) or call)
    return made


@pytest.fixture
def refusals(monkeypatch):
    def refuse(call):
        raise CannotCaptureError("it waits")

    monkeypatch.setattr(latency, "CapturedCall", refuse)


def test_networks_are_graphs_where_they_can_be(unet, captures):
    assert settled_launch(unet, FEW, GPU).cuda_graph is True and len(captures) == 1
    assert settled_launch(unet, FEW, CPU).cuda_graph is False and len(captures) == 1
    assert settled_launch(unet, replace(FEW, cuda_graph=False), GPU).cuda_graph is False and len(captures) == 1


def test_what_cannot_be_captured_is_timed_eagerly_and_says_so(unet, refusals, caplog):
    with caplog.at_level(logging.WARNING, "slimstep"):
        assert settled_launch(unet, FEW, GPU).cuda_graph is False
    assert "cannot be captured" in caplog.text and "it waits" in caplog.text
    with pytest.raises(ValueError, match="latency.cuda_graph=true: the network cannot be captured: it waits"):
        settled_launch(unet, replace(FEW, cuda_graph=True), GPU)
    with pytest.raises(ValueError, match="latency.cuda_graph=true needs a CUDA device, and this is cpu"):
        settled_launch(unet, replace(FEW, cuda_graph=True), CPU)


def test_networks_that_are_compared_are_launched_alike(unet, captures, monkeypatch):
    monkeypatch.setattr(latency, "settled_launch", lambda unet, config, device: replace(config, cuda_graph=True))
    compare_ms({"teacher": unet, "student": unet.with_architecture({"mid_block.attentions.0": 0})}, FEW, CPU)
    assert len(captures) == 2


def test_a_call_is_captured_where_it_is_to_be(unet, captures):
    for graph, count in ((None, 0), (False, 0), (True, 1)):
        forward_call(unet, replace(FEW, cuda_graph=graph))()
        assert len(captures) == count


@pytest.mark.parametrize(("device", "graph", "compiled", "method"), [
    (GPU, True, False, "difference_of_cuda_graphs"), (GPU, True, True, "difference_of_cuda_graphs"),
    (GPU, False, False, "difference_of_launches"), (GPU, False, True, "difference_of_launches"),
    (CPU, False, False, "in_place_hooks"), (CPU, False, True, "difference"),
])  # fmt: skip
def test_the_method_says_what_was_timed(device, graph, compiled, method):
    assert method_of(LatencyConfig(cuda_graph=graph, compile=compiled), device) == method
