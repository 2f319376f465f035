"""Progress bars: live in a terminal, a line now and then in a log file, nothing for work of a moment."""

import sys

from tqdm import tqdm


def progress(iterable=None, **options) -> tqdm:
    """tqdm with this project's manners; takes tqdm's own arguments."""
    seconds = 0.2 if sys.stderr.isatty() else 20
    return tqdm(iterable, dynamic_ncols=True, mininterval=seconds, maxinterval=seconds, delay=1, **options)
