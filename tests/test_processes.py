"""What does not depend on how many processes share the work: scores to the bit on the CPU, training to rounding."""

import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from slimstep import ROOT
from slimstep.eval.evaluator import place
from tests.distill.test_steps_job import SMALL as DISTILLING
from tests.eval.test_evaluation import ANY_DATA as EVALUATING
from tests.jobs import run_job
from tests.prune.test_job import SMALL

DIVERSITY = ["evaluation.diversity_prompts=3", "evaluation.diversity_seeds=3"]
PRUNING = ["+experiment=prune_unet", *SMALL]

ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--main_process_port=0"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
LAUNCHERS = {2: [*ACCELERATE, "--num_processes=2"], 3: [*TORCHRUN, "--nproc_per_node=3"]}


def launch(processes, root, *overrides):
    done = start(processes, root, *overrides)
    assert done.returncode in (0, 3), done.stderr
    (run,) = root.glob("*/config.yaml")
    return run.parent


def start(processes, root, *overrides):
    """One process is that of the test."""
    size = [] if any(override.startswith("data=") for override in overrides) else ["data.pairs.size=16"]
    named = [f"name={word[12:]}" for word in overrides if word.startswith("+experiment=")]
    job = [*named, *size, f"root={root}", *overrides]
    if processes == 1:
        return run_job(*job)
    command = [sys.executable, *LAUNCHERS[processes], str(ROOT / "train.py"), *job]
    on_cpu = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, capture_output=True, text=True, env=on_cpu, timeout=300)


@pytest.mark.slow
def test_three_processes_score_as_one_does(tmp_path, tiny_model):
    job = [*PRUNING, "search.rounds=1", *tiny_model]
    one = launch(1, tmp_path / "one", *job)
    (tmp_path / "3/prune_unet/round-00").mkdir(parents=True)
    shutil.copy(one / "round-00/weights.safetensors", tmp_path / "3/prune_unet/round-00")  # the same network to score
    three = launch(3, tmp_path / "3", *job)
    for artifact in ("scorer_check.json", "round-00/scores.json", place("teacher", 2, 2.5)):
        assert (three / artifact).read_bytes() == (one / artifact).read_bytes(), artifact


@pytest.mark.slow
def test_two_processes_score_after_local_recovery_as_one_does(tmp_path, tiny_model):
    job = [*PRUNING, "search.rounds=1", "scoring.recovery_steps=2", *tiny_model]
    one = launch(1, tmp_path / "one", *job)
    (tmp_path / "2/prune_unet/round-00").mkdir(parents=True)
    shutil.copy(one / "round-00/weights.safetensors", tmp_path / "2/prune_unet/round-00")  # the same network to score
    two = launch(2, tmp_path / "2", *job)
    scores = (one / "round-00/scores.json").read_bytes()
    assert (two / "round-00/scores.json").read_bytes() == scores and b"before_recovery" in scores


@pytest.mark.slow
def test_three_processes_evaluate_a_distillation_as_one_does(tmp_path, tiny_model):
    job = [*DISTILLING, "distillation.steps=[4,2]", "eval.batch_size=2", *DIVERSITY, *tiny_model]
    one = launch(1, tmp_path / "one", *job)
    shutil.copytree(one / "steps-2", tmp_path / "3/distill_steps/steps-2")  # the same student to judge
    (tmp_path / "3/distill_steps/steps-2/export.sealed.json").unlink()
    three = launch(3, tmp_path / "3", *job)
    artifacts = sorted(path.relative_to(one) for path in one.glob("evaluation/*/*.json"))
    artifacts += sorted(path.relative_to(one) for path in one.glob("images/**/*.png"))
    assert len(artifacts) == 3 * 2 + 1 + 2 * 7
    for artifact in artifacts:
        assert (three / artifact).read_bytes() == (one / artifact).read_bytes(), artifact


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(tmp_path, tiny_model):
    job = [*EVALUATING, "eval.prompts=5", "eval.batch_size=2", *DIVERSITY, *tiny_model]
    one, two = (launch(processes, tmp_path / str(processes), *job) for processes in (1, 2))
    artifacts = sorted(
        path.relative_to(one) for kind in ("evaluation/*/*.json", "images/**/*.png") for path in one.glob(kind)
    )
    assert len(artifacts) == 4 + 4 * 2
    for artifact in [*artifacts, "reference/real-fd.safetensors", "table.md", "results.csv"]:
        assert (two / artifact).read_bytes() == (one / artifact).read_bytes(), artifact
    ours, theirs = (json.loads((run / "evaluation.json").read_text()) for run in (one, two))
    assert ours.pop("environment") != theirs.pop("environment") and ours == theirs


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_accumulation(tmp_path, tiny_model):
    job = [*PRUNING, "search=manual", *tiny_model]
    one = launch(1, tmp_path / "one", *job, "train.accumulation=2", "train.steps=6")
    two = launch(2, tmp_path / "two", *job, "train.accumulation=1", "train.steps=6")
    ours, theirs = (load_file(run / "round-00/weights.safetensors") for run in (one, two))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_rank_that_fails_takes_the_others_down_and_says_why(tmp_path, tiny_model):
    (tmp_path / "0.txt").write_text("\n".join(f"prompt {letter}" for letter in "abcdefghijk"))  # rank 1 has none
    prompts = f"data.prompt_file={tmp_path}/${{oc.env:RANK}}.txt"
    failed = start(2, tmp_path, *PRUNING, "search=manual", *tiny_model, prompts)
    assert failed.returncode == 1 and f"rank 1: error: prompt file {tmp_path}/1.txt does not exist" in failed.stderr


@pytest.mark.slow
def test_a_rank_that_vanishes_inside_training_ends_the_others_in_one_line(tmp_path, tiny_model):
    job = [str(ROOT / "train.py"), "name=prune_unet", *PRUNING, "search=manual", "data.pairs.size=16",
           "train.steps=100000", f"root={tmp_path}", *tiny_model]  # fmt: skip
    on_cpu = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *TORCHRUN, "--nproc_per_node=2", *job]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=on_cpu)
    while not (tmp_path / "prune_unet/metrics.jsonl").exists():
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.2)
    ranks = {rank.environ().get("RANK"): rank for rank in psutil.Process(launcher.pid).children(recursive=True)}
    ranks["1"].kill()
    _, stderr = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    said = [line for line in stderr.splitlines() if line.startswith(("stopped: another rank is gone", "stopped by"))]
    assert len(said) == 1 and "gloo" not in stderr, stderr
