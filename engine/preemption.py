"""Signals that schedulers send before they take a machine away: the work so far is kept, the exit code says so.

Inside training the next logged step writes a checkpoint, and then the signal takes its course; everywhere else it does
so at once, for what is not whole yet is made again. The same command continues.

What fails between the signal and the checkpoint is laid to the signal: it reaches other ranks and loaders as well, and
those that leave first take the rest with them.
"""

import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from slimstep.engine.quiet import one_line

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("slimstep")
Handler = Callable[[int, FrameType | None], Any] | int | None  # what signal.signal takes and returns
CONTINUE_ME = 75  # EX_TEMPFAIL of sysexits.h: failed for now, the caller is invited to try again
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # everybody's, and submitit's, which then puts the job back into the queue


class Preempted(SystemExit):
    """Leaves with CONTINUE_ME; not an Exception, so that nobody takes it for a mistake."""

    def __init__(self) -> None:
        super().__init__(CONTINUE_ME)


def leave_on_sigterm() -> None:
    """From now on SIGTERM raises Preempted in the main thread."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise Preempted

    signal.signal(signal.SIGTERM, leave)


def was_preempted(error: BaseException | None) -> bool:
    """Whether SIGTERM is what ended the job, also where a library's own clean-up failed on the way out."""
    return error is not None and (isinstance(error, Preempted) or was_preempted(error.__context__))


class NotedSignals:
    """While the block runs, SIGNALS interrupt nothing; at its end those that came go to their own handlers."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self.handlers: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> "NotedSignals":
        self.handlers = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def note(self, signum: int, frame: FrameType | None) -> None:
        self.came.append(signum)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if isinstance(error, Exception) and self.came:
            log.warning(f"after {signal.Signals(self.came[0]).name}: {type(error).__name__}: {one_line(error)}")
        if error is None or isinstance(error, Exception):
            for signum in self.came:
                signal.raise_signal(signum)

    def on_any_rank(self, accelerator: "Accelerator") -> list[int]:
        """The signals that came on this rank or another; all ranks ask together, so that all take the same way."""
        import torch  # here, since whoever only leaves by signal does without it

        here = torch.tensor([float(number in self.came) for number in SIGNALS], device=accelerator.device)
        ranks = accelerator.reduce(here, "sum").tolist()
        return [number for number, count in zip(SIGNALS, ranks, strict=True) if count]

    def take_course(self, came: list[int]) -> None:
        """Hands them over now. Returns where the handlers do: submitit, which waits for SIGUSR2, lets SIGTERM pass."""
        self.came = came
        self.__exit__(None, None, None)
        self.came = []
        self.__enter__()


def leave_signals_to_the_parent(worker: int) -> None:
    """For a DataLoader's workers, whom a scheduler's signal reaches too: they are needed until the checkpoint."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
