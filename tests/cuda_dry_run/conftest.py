"""The device that is not there, and jobs on it."""

import sys
from collections import Counter

import pytest
from accelerate.state import AcceleratorState

from slimstep.engine.launch import main
from tests.cuda_dry_run.device import cuda_dry_run


@pytest.fixture
def gpu():
    """The mode of a device that is not there while the test runs; accelerate, which remembers the first device of a
    process, forgets those of other tests, and this one."""
    AcceleratorState._reset_state(True)
    with cuda_dry_run() as mode:
        yield mode
    AcceleratorState._reset_state(True)


@pytest.fixture
def run(gpu, monkeypatch, tiny_model, tmp_path):
    """Runs an experiment on the device that is not there, in bfloat16 where nothing else is said.

    Gives its exit code and its waits.
    """

    def job(experiment: str, *overrides: str) -> tuple[int, Counter[str]]:
        words = [f"+experiment={experiment}", *tiny_model, "data.pairs.size=16", f"root={tmp_path / 'runs'}",
                 "mixed_precision=bf16", f"data.cache.folder={tmp_path / 'cache'}", "debug=true"]  # fmt: skip
        named = {word.partition("=")[0] for word in overrides}
        words = [word for word in words if word.partition("=")[0] not in named]
        monkeypatch.setattr(sys, "argv", ["train.py", *words, *overrides])
        with gpu.counted() as waits, pytest.raises(SystemExit) as leaving:
            main()
        return leaving.value.code, waits

    return job
