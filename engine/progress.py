"""Progress bars: live in a terminal, a line now and then in a log file, nothing for work of a moment."""

import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS, SECONDS_IN_LOGS = 0.2, 10


class LinesInLogs(tqdm):
    """A bar whose every state is a line of its own: a log file knows no carriage return."""

    disable: bool

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        def write(line: str) -> None:
            if line:
                file.write(f"{line}\n")
                file.flush()

        return write

    def moveto(self, n: int) -> None:
        pass  # bars within bars do not share a screen here

    def close(self) -> None:
        """The last state, where any was shown."""
        if self.disable:
            return
        if self.leave and self.last_print_t >= self.start_t + self.delay:
            self.display()
        self.disable = True
        self._decr_instances(self)


def progress(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """tqdm with this project's manners; takes tqdm's own arguments."""
    live = sys.stderr.isatty()
    seconds = SECONDS if live else SECONDS_IN_LOGS
    manners = {"dynamic_ncols": True, "mininterval": seconds, "maxinterval": seconds, "delay": 1}
    return (tqdm if live else LinesInLogs)(iterable, **{**manners, **options})
