"""How diffusers and transformers are kept from talking, and what they raise is shortened to a line."""

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from logging import CRITICAL

FOLLOWS_NULL = re.compile(r"interpolation '\$\{(?P<source>.+?)\}': .*'None'.*?full_key: (?P<key>\S+)", re.DOTALL)
LINE, HEAD, SHOWN, NAME = 600, 420, 3, 100  # characters; characters; names; characters


def one_line(error: BaseException) -> str:
    """What an error says, in a bounded line. The whole text is in the exception."""
    if nothing := FOLLOWS_NULL.search(str(error)):
        return f"{nothing['key']} takes its value from {nothing['source']}, which is null; set {nothing['source']}"
    return bounded(str(error))


def bounded(text: str) -> str:
    """A line of at most 600 characters: of a longer one the beginning, and the end with the way out."""
    text = " ".join(text.split())
    if len(text) <= LINE:
        return text
    cut = " […] "
    return text[:HEAD] + cut + text[HEAD + len(cut) - LINE :]


def preview(names: Iterable[str]) -> str:
    """The first three of many names, long ones cut: `a, b, c and 7 more`."""
    names = list(names)
    shown = ", ".join(name if len(name) <= NAME else f"{name[:NAME]}…" for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings from diffusers and transformers."""
    import diffusers  # here, since `one_line` serves those who do without these libraries
    import transformers

    loggings = (diffusers.utils.logging, transformers.utils.logging)
    before = [(logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in loggings]
    for logging in loggings:
        logging.set_verbosity(CRITICAL)  # what goes wrong is raised
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logging, (verbosity, has_bars) in zip(loggings, before, strict=True):
            logging.set_verbosity(verbosity)
            if has_bars:
                logging.enable_progress_bar()
