"""A command line run in the process of the test, which has loaded what a new process takes seconds to import."""

import io
import logging
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from subprocess import CompletedProcess

import pytest

from slimstep.engine.launch import main


def run_job(*overrides: object) -> CompletedProcess[str]:
    """What `train.py` with these overrides returns and prints, as subprocess.run tells it."""
    command, stdout, stderr = ["train.py", *map(str, overrides)], io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(stderr)  # the command line's own does nothing where pytest has put its handlers
    handler.setFormatter(logging.Formatter("%(message)s"))
    root, argv, on_sigterm = logging.getLogger(), sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = list(command)
    root.addHandler(handler)
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as leaving:
            main()
    finally:
        sys.argv = argv
        root.removeHandler(handler)
        signal.signal(signal.SIGTERM, on_sigterm)  # a job leaves its own, which would outlive a SIGTERM to pytest
    return CompletedProcess(command, leaving.value.code or 0, stdout.getvalue(), stderr.getvalue())
