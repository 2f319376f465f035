"""What every mistake of a user has to end in."""


def error_line(code, stderr):
    """The one line of an orderly exit."""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and "Traceback" not in stderr, (code, stderr)
    return lines[0]
