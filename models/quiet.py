"""How diffusers and transformers are kept from talking, and what they raise is told."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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
