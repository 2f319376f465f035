"""SIGTERM, as schedulers send it before they take a machine away: the work so far is kept, the exit code says so.

Inside training the next logged step writes a checkpoint and leaves; everywhere else the process leaves at once, for
what is not whole yet is made again. The same command continues.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

CONTINUE_ME = 75  # EX_TEMPFAIL of sysexits.h: failed for now, the caller is invited to try again


class Preempted(SystemExit):
    """Leaves with CONTINUE_ME; not an Exception, so that nobody takes it for a mistake."""

    def __init__(self, where: str = "") -> None:
        super().__init__(CONTINUE_ME)
        self.where = where


def leave_on_sigterm() -> None:
    """From now on SIGTERM raises Preempted in the main thread."""

    def leave(signum, frame):
        raise Preempted

    signal.signal(signal.SIGTERM, leave)


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGTERM has come since the block began; inside it the signal interrupts nothing."""
    came = False

    def note(signum, frame):
        nonlocal came
        came = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)


def anywhere(here: bool, accelerator) -> bool:
    """Whether it is so on any rank; all ranks ask together."""
    return bool(accelerator.reduce(torch.tensor(float(here), device=accelerator.device), "sum"))
