"""`slimstep +experiment=NAME …` is train.py; `slimstep budgets`, `compare`, `convert`, `push` and `report` are not.

With several processes: `accelerate launch -m slimstep +experiment=NAME …`.
"""

import os
import signal
import sys
from importlib import import_module

COMMANDS = ("budgets", "compare", "convert", "push", "report")


def main() -> None:
    """Runs the command that the first word names, or the experiment of the others."""
    if sys.argv[1:2] == ["--version"]:
        import slimstep

        print(f"slimstep {slimstep.__version__}")
    elif sys.argv[1:] and sys.argv[1] in COMMANDS:
        command(sys.argv.pop(1))
    else:
        train()


def command(name: str) -> None:
    from slimstep.engine.console import open_console

    open_console()
    sys.argv[0] = f"slimstep {name}"
    sys.exit(import_module(f"slimstep.commands.{name}").main())


def train() -> None:
    """Runs the experiment that the command line names (train.py)."""
    # Importing takes seconds; from the first on SIGTERM leaves with the code that says "continue me".
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    from slimstep.engine.console import open_console

    open_console()  # before a library keeps hold of stderr
    import slimstep.configs.schema  # noqa: F401  the keys of all jobs
    from slimstep.engine.launch import main

    main()


if __name__ == "__main__":
    main()
