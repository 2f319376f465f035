"""Measurements in processes of their own, which may run out of memory or be killed: their result, or one line why."""

import json
import signal
import subprocess
import textwrap
from collections.abc import Sequence
from typing import Any

from slimstep.eval.timing.inference import CannotRunError

TRACEBACK = "Traceback (most recent call last):"


def child_result(command: Sequence[str], **options: Any) -> dict[str, Any]:
    """The JSON object that a process prints last. `options` are subprocess.run's.

    Raises CannotRunError, with one line, where the process fails, is killed, or prints no such thing.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", **options)
    if done.returncode:
        raise CannotRunError(f"its own process {ending(done.returncode)}: {reason_in(done.stderr)}")
    try:
        result = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        result = None
    if not isinstance(result, dict):
        raise CannotRunError(f"its own process ended without a result: {reason_in(done.stderr)}")
    return result


def ending(code: int) -> str:
    """An exit code in words; a negative one is a signal's."""
    if code > 0:
        return f"failed with exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    hint = ", as where memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by {names.get(-code, f'signal {-code}')}{hint}"


def reason_in(stderr: str) -> str:
    """One line of what a process said: its last exception, whose hints may follow for lines, or else its last line."""
    _, match, traceback = stderr.rpartition(TRACEBACK)
    lines = [line for line in traceback.splitlines() if line.strip()]
    if match:
        lines = [line for line in lines if not line[0].isspace()][:1] or lines[-1:]
    return textwrap.shorten(lines[-1], 400, placeholder=" …") if lines else "it said nothing"
