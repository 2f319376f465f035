"""A call as one CUDA graph: its kernels without the host's time between them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

WARMUP = 3  # eager calls before the capture: kernels are chosen, workspaces taken


class CannotCaptureError(Exception):
    """This call cannot become a CUDA graph; says why."""


class CapturedCall:
    """`call` captured on the current CUDA device. What it reads is read from the same memory again at every replay, and
    so is kept.

    Raises CannotCaptureError where it waits for the device, which is found out before the capture: a capture that fails
    can leave the device useless.
    """

    def __init__(self, call: Callable[[], None]):
        self.call = call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(WARMUP):
                    call()
                with waits_are_errors():
                    call()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                call()
        except RuntimeError as error:
            raise CannotCaptureError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error

    def __call__(self) -> None:
        self.graph.replay()


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """torch raises where the host would wait for the device, as a copy between them does."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
