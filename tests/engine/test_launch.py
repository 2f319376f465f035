"""The command line: what a sweep calls its jobs."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from slimstep.engine import execution
from slimstep.engine.checked import ROOT, run_path
from slimstep.engine.launch import check_overrides, named_by_what_is_swept
from slimstep.engine.names import disk_name
from slimstep.engine.preemption import Preempted, was_preempted

SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize(
    ("overrides", "left_out"),
    [
        (["-m", "+experiment=prune_unet", "seed=0,1"], "experiment"),
        (["--multirun", "hydra/launcher=submitit_slurm", "train.steps=5", "seed=0,1"], "hydra/launcher,train.steps"),
        (["-m", "train.steps=5", "train.steps=2,3", "model=shapes"], "model"),
        (["-m", "model.name_or_path=/a/b", "seed=range(3)"], "model.name_or_path"),
    ],
)
def test_jobs_of_a_sweep_are_named_by_what_is_swept(overrides, left_out):
    assert named_by_what_is_swept(overrides) == [f"hydra.job.config.override_dirname.exclude_keys=[{left_out}]"]


SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["-m", "+experiment=prune_unet", "serch=manual,random"], "serch=manual: the configuration has no key 'serch'"),
        (["-m", "+experiment=nothing", "seed=0,1"], "nothing"),
        (["--multirun", "+experiment=prune_unet", "seed=x,1"], "seed=x"),
    ],
)
def test_a_sweep_is_checked_before_it_starts(overrides, said, capsys):
    with pytest.raises(SystemExit):
        check_overrides(overrides)
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


def test_the_traceback_of_a_try_goes_with_the_run_that_ends_well(monkeypatch, tmp_path, capsys):
    answers = iter([KeyError("nobody knew"), 0, 0])

    def job(config):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(execution, "run_job", job)
    monkeypatch.setattr(execution, "run_path", lambda config: tmp_path)
    config = OmegaConf.create({"stages": {}, "debug": False, "plan": False})
    kept = tmp_path / "traceback-rank-0.txt"
    assert execution.execute(config) == 1 and "nobody knew" in kept.read_text()
    assert "not foreseen" in capsys.readouterr().err
    assert execution.execute(OmegaConf.merge(config, {"plan": True})) == 0 and kept.exists()
    assert execution.execute(config) == 0 and not kept.exists()


def test_a_sweep_on_slurm_passes_the_check():
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=1440"]
    check_overrides(["-m", *launcher, "+experiment=prune_unet", "search.target_fraction=0.6,0.75"])


def swept_path(monkeypatch, root, what, name="prune_unet"):
    job = SimpleNamespace(job=SimpleNamespace(override_dirname=what), mode=RunMode.MULTIRUN)
    monkeypatch.setattr("slimstep.engine.checked.HydraConfig", SimpleNamespace(get=lambda: job))
    return run_path(OmegaConf.create({"root": str(root), "name": name}))


def test_a_job_of_a_sweep_over_long_values_has_a_folder_of_its_own(tmp_path, monkeypatch):
    short = swept_path(monkeypatch, tmp_path, "data.source=a/b,seed=1")
    assert short == tmp_path / "prune_unet/data.source=a_b,seed=1"
    values = [f"search.method.remove=[{','.join(['down_blocks.ä.attentions.0'] * 40)}],seed={k}" for k in range(3)]
    paths = [swept_path(monkeypatch, tmp_path, value) for value in values]
    assert len(set(paths)) == 3 and paths == [swept_path(monkeypatch, tmp_path, value) for value in values]
    for path in paths:
        path.mkdir(parents=True)
        (path.parent / f"{path.name}.before-10").mkdir()
        assert path.name.startswith("search.method.remove=[down_blocks.ä")
    inside = swept_path(monkeypatch, paths[0], values[0], name="distill_steps")  # a stage of this job's workflow
    assert inside == paths[0] / "distill_steps"


def test_a_name_that_no_folder_can_have_is_reported(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^name=x+… is a name of 256 bytes, and at most 255 can be") as error:
        swept_path(monkeypatch, tmp_path, "", name="x" * 256)
    assert len(str(error.value)) < 200


def test_what_is_too_long_for_a_disk_keeps_its_beginning_and_differs_by_its_end():
    assert disk_name("a" * 255) == "a" * 255
    names = {disk_name("ß" * n, longest) for n in (128, 129, 5000) for longest in (40, 128, 255)}
    assert len(names) == 9 and all(len(name.encode()) <= 200 and name.startswith("ßß") for name in names)


def test_one_job_keeps_its_name():
    assert named_by_what_is_swept(["+experiment=prune_unet", "seed=0"]) == []
    assert named_by_what_is_swept(["+experiment=prune_unet", "--verbose"]) == []
    assert named_by_what_is_swept(["-m", "train={"]) == []  # Hydra says what is wrong with it


def test_the_command_line_answers_without_torch():
    """Listing experiments and naming a misspelt key import no library that takes seconds."""
    heavy = "torch diffusers transformers accelerate numpy PIL matplotlib"
    modules = f"[name for name in '{heavy}'.split() if name in sys.modules]"
    code = f"import sys, configs.schema, engine.launch; print({modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if "__main__" in path.read_text()])
def test_scripts_tell_their_options_without_torch(script):
    code = (f"import sys, runpy; sys.argv = [{script!r}, '--help']\n"
            f"try: runpy.run_path('scripts/{script}', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "print('torch' in sys.modules)")  # fmt: skip
    message = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert len(message) > 200 and message.splitlines()[-1] == "False"
