"""The one entry: `accelerate launch train.py +experiment=NAME [overrides]`; without an experiment it lists them."""

import os
import signal

# Importing takes seconds; from the first on SIGTERM leaves with the code that says "continue me".
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))

from engine.console import open_console  # noqa: E402

open_console()  # before a library keeps hold of stderr

import configs.schema  # noqa: E402, F401  the keys of all jobs
from engine.launch import main  # noqa: E402

if __name__ == "__main__":
    main()
