"""The command line: what a sweep calls its jobs."""

import pytest

from engine.launch import named_by_what_is_swept


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


def test_one_job_keeps_its_name():
    assert named_by_what_is_swept(["+experiment=prune_unet", "seed=0"]) == []
    assert named_by_what_is_swept(["+experiment=prune_unet", "--verbose"]) == []
    assert named_by_what_is_swept(["-m", "train={"]) == []  # Hydra says what is wrong with it
