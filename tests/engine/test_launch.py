"""The command line: what a sweep calls its jobs."""

import subprocess
import sys

import pytest

from engine.checked import ROOT
from engine.launch import check_overrides, named_by_what_is_swept
from engine.preemption import Preempted, was_preempted


@pytest.mark.parametrize(
    ("words", "left_out"),
    [
        (["-m", "+experiment=prune_unet", "seed=0,1"], "experiment"),
        (["--multirun", "hydra/launcher=submitit_slurm", "train.steps=5", "seed=0,1"], "hydra/launcher,train.steps"),
        (["-m", "train.steps=5", "train.steps=2,3", "model=shapes"], "model"),
        (["-m", "model.name_or_path=/a/b", "seed=range(3)"], "model.name_or_path"),
    ],
)
def test_jobs_of_a_sweep_are_named_by_what_is_swept(words, left_out):
    assert named_by_what_is_swept(words) == [f"hydra.job.config.override_dirname.exclude_keys=[{left_out}]"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "+experiment=prune_unet", "serch=manual,random"], "serch=manual: the configuration has no key 'serch'"),
        (["-m", "+experiment=nothing", "seed=0,1"], "nothing"),
        (["--multirun", "+experiment=prune_unet", "seed=x,1"], "seed=x"),
    ],
)
def test_a_sweep_is_checked_before_it_starts(words, said, capsys):
    with pytest.raises(SystemExit):
        check_overrides(words)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0], lines


def test_a_clean_up_that_fails_after_sigterm_is_no_mistake():
    """torch's mode stacks, for one, are popped twice where a signal interrupts their making."""
    with pytest.raises(RuntimeError) as failed:
        try:
            raise Preempted
        finally:
            raise RuntimeError("trying to pop from empty mode stack")
    assert was_preempted(failed.value) and not was_preempted(RuntimeError("of its own"))


def test_a_sweep_on_slurm_passes_the_check():
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=1440"]
    check_overrides(["-m", *launcher, "+experiment=prune_unet", "search.target_fraction=0.6,0.75"])


def test_one_job_keeps_its_name():
    assert named_by_what_is_swept(["+experiment=prune_unet", "seed=0"]) == []
    assert named_by_what_is_swept(["+experiment=prune_unet", "--verbose"]) == []
    assert named_by_what_is_swept(["-m", "train={"]) == []  # Hydra says what is wrong with it


def test_the_command_line_answers_without_torch():
    """Listing experiments and naming a misspelt key import no library that takes seconds."""
    heavy = "torch diffusers transformers accelerate numpy PIL matplotlib"
    code = f"import sys, engine.launch; print([name for name in '{heavy}'.split() if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "[]"
