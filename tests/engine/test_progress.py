"""Progress in a log file, where there is no terminal."""

import io

from slimstep.engine.progress import progress

OFTEN = {"mininterval": 0, "delay": 0, "miniters": 1}


def test_every_state_is_a_line_of_its_own():
    log = io.StringIO()
    for _ in progress(range(3), desc="scoring", file=log, **OFTEN):
        pass
    text = log.getvalue()
    assert "\r" not in text and "\n\n" not in text
    lines = text.splitlines()
    assert all(line.startswith("scoring") for line in lines) and "3/3" in lines[-1]


def test_bars_within_bars_do_not_mix():
    log = io.StringIO()
    for _ in progress(range(2), desc="outer", file=log, **OFTEN):
        for _ in progress(range(2), desc="inner", file=log, leave=False, **OFTEN):
            pass
    assert "\r" not in log.getvalue() and "\x1b" not in log.getvalue()
    assert all(line.startswith(("outer", "inner")) for line in log.getvalue().splitlines())


def test_work_of_a_moment_says_nothing():
    log = io.StringIO()
    for _ in progress(range(3), file=log):
        pass
    assert log.getvalue() == ""
