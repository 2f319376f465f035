"""What a program says reaches any terminal: one that knows ASCII or Latin-1 alone, and one whose reader has left.

Without this a table with a ± in it ends a finished job with exit code 1 where stdout is ASCII, and so does `| head`.
Nothing here imports more than the standard library: it runs before everything else.
"""

import codecs
import io
import json
import locale
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

SPELT = {
    "→": "->", "←": "<-", "−": "-", "–": "-", "—": "-", "─": "-", "│": "|", "…": "...", "±": "+/-", "×": "x", "·": "*",
    "Δ": "Delta ", "ε": "eps", "ρ": "rho", "σ": "sigma", "α": "alpha", "β": "beta", "γ": "gamma", "λ": "lambda",
    "µ": "u", "μ": "u", "¹": "^1", "²": "^2", "³": "^3", "⁹": "^9", "≤": "<=", "≥": ">=", "≈": "~", "≠": "!=",
    "‘": "'", "’": "'", "“": '"', "”": '"', "½": "1/2", "°": " degrees", "§": "section ", "\N{NO-BREAK SPACE}": " ",
}  # fmt: skip
HANDLER = "slimstep.spelt"


def spelt(error: UnicodeError) -> tuple[str, int]:
    """The error handler of an encoding: what it lacks as letters that it has, and as an escape where we know none."""
    assert isinstance(error, UnicodeEncodeError), f"{error!r} is of reading, and this handler of writing"
    lacking = error.object[error.start : error.end]
    return "".join(SPELT.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in lacking), error.end


class LeftReader(io.FileIO):
    """A descriptor that is written to for as long as anybody reads it; what comes after that is dropped."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def open_console() -> None:
    """stdout and stderr take every sign, and work goes on where their reader leaves. For programs, as the first thing.

    A program whose Python would write files in another encoding than UTF-8 begins anew in one that does not.
    """
    if not sys.flags.utf8_mode and codecs.lookup(locale.getencoding()).name != "utf-8":
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        os.environ |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": os.environ.get("PYTHONIOENCODING") or encoding}
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    codecs.register_error(HANDLER, spelt)
    sys.stdout, sys.stderr = lasting(sys.stdout, live=False), lasting(sys.stderr, live=True)


def lasting(stream: TextIO | None, live: bool) -> TextIO | None:
    """`stream` over the same descriptor, with an encoding that lacks nothing; None where there is none (`>&-`).

    `live`: every line is written at once, as on a terminal; everything is where PYTHONUNBUFFERED asks for it.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    descriptor, at_once = LeftReader(stream.fileno(), "w", closefd=False), stream.write_through
    below = descriptor if at_once else io.BufferedWriter(descriptor)
    lines = live or stream.isatty()
    return io.TextIOWrapper(below, stream.encoding, errors=HANDLER, line_buffering=lines, write_through=at_once)


def print_for_programs(value: Any) -> None:
    """A line of JSON for whoever reads stdout by program; on a terminal, where tables say the same, nothing."""
    if not sys.stdout.isatty():
        print(json.dumps(value))
