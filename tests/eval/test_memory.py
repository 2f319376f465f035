"""Memory that is reported is memory that is held: by weights of any width, and by graphs that are only replayed."""

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from slimstep.eval.timing.memory import MemoryFrom, held_bytes, idle_graph_bytes


def int8_weight(rows=64, columns=32):
    """A tensor that says float32 and holds int8 with a scale for each row, as torchao's do."""

    class Int8(torch.Tensor):
        @staticmethod
        def __new__(cls, values, scales):
            return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scales.dtype)

        def __init__(self, values, scales):
            self.values, self.scales = values, scales

        def __tensor_flatten__(self):
            return ["values", "scales"], None

        @staticmethod
        def __tensor_unflatten__(inner, meta, size, stride):
            return Int8(inner["values"], inner["scales"])

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
                return Int8(args[0].values, args[0].scales)
            raise NotImplementedError(function)

    return Int8(torch.zeros(rows, columns, dtype=torch.int8), torch.zeros(rows))


def test_quantized_weights_count_what_they_hold_and_not_what_they_say():
    layer = nn.Linear(32, 64, bias=False)
    assert held_bytes(layer.parameters()) == 64 * 32 * 4
    layer.weight = nn.Parameter(int8_weight(), requires_grad=False)
    assert next(layer.parameters()).dtype == torch.float32  # which is why bytes of elements say nothing
    assert held_bytes(layer.parameters()) == 64 * 32 + 64 * 4


def test_wrappers_of_wrappers_are_looked_through():
    nested = TwoTensor(TwoTensor(torch.zeros(8), torch.zeros(8)), TwoTensor(torch.zeros(8), torch.zeros(8)))
    assert held_bytes([nested]) == 4 * 8 * 4


def test_storages_are_counted_once_and_whole():
    whole = torch.zeros(10, 4)
    assert held_bytes([whole, whole.view(-1), whole[3:]]) == held_bytes([whole[0]]) == 160
    assert held_bytes([whole, whole.clone()]) == 320 and held_bytes([]) == 0


def segment(pool, total, allocated, device=0):
    return {"device": device, "segment_pool_id": pool, "total_size": total, "allocated_size": allocated}


def test_idle_memory_of_graphs_is_that_of_private_pools_of_this_device():
    segments = [segment((0, 0), 100, 10), segment((0, 1), 50, 20), segment((3, 0), 8, 0), segment((0, 1), 9, 0, 1)]
    assert idle_graph_bytes(segments, 0) == 38 and idle_graph_bytes(segments, 1) == 9


class Device:
    """The counters of a CUDA device: memory is taken, reserved, let go, and kept by graphs."""

    def __init__(self, monkeypatch):
        self.allocated = self.peak = self.cached = self.pool = self.most_reserved = 0
        counters = {
            "memory_allocated": lambda device: self.allocated,
            "max_memory_allocated": lambda device: self.peak,
            "memory_reserved": lambda device: self.reserved,
            "max_memory_reserved": lambda device: self.most_reserved,
            "memory_snapshot": lambda: [segment((0, 7), self.pool, 0)] if self.pool else [],
            "reset_peak_memory_stats": self.reset,
            "empty_cache": lambda: setattr(self, "cached", 0),
        }
        for name, counter in counters.items():
            monkeypatch.setattr(torch.cuda, name, counter)

    @property
    def reserved(self):
        return self.allocated + self.cached + self.pool

    def reset(self, device):
        self.peak, self.most_reserved = self.allocated, self.reserved

    def use(self, size):
        """Allocates and frees; the memory stays in the allocator's cache."""
        self.peak = max(self.peak, self.allocated + size)
        self.cached = max(self.cached, size)
        self.most_reserved = max(self.most_reserved, self.reserved)

    def capture(self, size):
        """A graph's memory, allocated and freed during the capture, stays in its pool."""
        self.peak = max(self.peak, self.allocated + size)
        self.pool += size
        self.most_reserved = max(self.most_reserved, self.reserved)


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


WEIGHTS, ACTIVATIONS, TEXT = [torch.zeros(25)], 1000, 30


def eager(device):
    return lambda: device.use(ACTIVATIONS + TEXT)


def captured(device):
    def call():
        if not device.pool:
            device.use(ACTIVATIONS)  # warming up
            device.capture(ACTIVATIONS)
        device.use(TEXT)

    return call


@pytest.mark.parametrize("way", [eager, captured])
def test_a_captured_call_needs_the_memory_of_an_eager_one(device, way):
    device.allocated = 100 + 5000  # the weights, and another pipeline
    call = way(device)
    memory = MemoryFrom(torch.device("cuda", 0))
    call()
    assert memory.of(call, WEIGHTS) == {"memory": 1130, "memory_reserved": 1130}


def test_graphs_of_others_are_not_counted(device):
    device.pool = 700
    memory, call = MemoryFrom(torch.device("cuda", 0)), eager(device)
    call()
    assert memory.of(call, WEIGHTS)["memory"] == 1130


def test_a_cpu_has_none():
    assert MemoryFrom(torch.device("cpu")).of(lambda: None, WEIGHTS) == {"memory": None, "memory_reserved": None}
