"""Bytes of a CUDA device that a pipeline needs: its weights, and what a call takes beside them.

torch counts what is allocated at a moment. A CUDA graph allocates while it is captured and nothing when it is replayed,
and its private pool stays taken all the same: what is counted begins before the capture, and the pools are counted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

DEFAULT_POOL = (0, 0)  # torch's id of the memory that belongs to no graph


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages behind the tensors, each counted once.

    A tensor that wraps others counts as those: quantized weights say the dtype that they had before.
    """
    sizes = {storage._cdata: storage.nbytes() for tensor in tensors for storage in storages(tensor)}
    return sum(sizes.values())


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """What a tensor, or the tensors that it wraps, lie in."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.untyped_storage()
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from storages(getattr(tensor, name))


def idle_graph_bytes(segments: Iterable[Mapping[str, Any]], device: int) -> int:
    """What the private pools of CUDA graphs hold beside allocated tensors, from `torch.cuda.memory_snapshot()`."""
    private = (s for s in segments if s["device"] == device and tuple(s["segment_pool_id"]) != DEFAULT_POOL)
    return sum(segment["total_size"] - segment["allocated_size"] for segment in private)


class MemoryFrom:
    """What a pipeline comes to hold from this moment on; other pipelines' memory is not in it.

    Make it before the first call, in which graphs are captured.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            self.allocated, self.reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
            self.idle = self.idle_graphs()

    def of(self, call: Callable[[], None], weights: Iterable[Tensor]) -> dict[str, int | None]:
        """Bytes at the peak of one more call: `memory` allocated, the graphs' pools included, and `memory_reserved`.

        None on a CPU.
        """
        if self.device.type != "cuda":
            return {"memory": None, "memory_reserved": None}
        torch.cuda.empty_cache()  # what compiling and warming up has left
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        held = held_bytes(weights)
        allocated = torch.cuda.max_memory_allocated(self.device) - self.allocated + self.idle_graphs() - self.idle
        reserved = torch.cuda.max_memory_reserved(self.device) - self.reserved
        return {"memory": held + allocated, "memory_reserved": held + reserved}

    def idle_graphs(self) -> int:
        device = self.device.index if self.device.index is not None else torch.cuda.current_device()
        return idle_graph_bytes(torch.cuda.memory_snapshot(), device)
