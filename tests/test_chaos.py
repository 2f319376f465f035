"""Kills at random moments change nothing of what a run leaves: the campaign of scripts/chaos.py on the tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.chaos import SMALL, contents
from tests.test_snapfusion import SMALL as METHOD

ROOT = Path(__file__).resolve().parents[1]


DISTILLING = [
    "+experiment=distill_steps", "distillation.steps=[4,2,1]", "curves.steps=[1,2]", "curves.guidance=[2.5]",
    "data.pairs.size=64", "train.steps=16", "train.batch_size=4", "train.checkpoint_every=5", "train.accumulation=2",
    "train.workers=1", "eval.prompts=4", "eval.pictures=2", "objective.guided_share=0", "objective.cached_draws=2",
]  # fmt: skip
MATCHING = [
    "+experiment=distill_steps", "objective=dmd", "objective.adversarial_weight=1e-3", "distillation.steps=[4,2,1]",
    "curves.steps=[1,2]", "curves.guidance=[2.5]", "data.pairs.size=64", "train.steps=16",
    "train.batch_size=4", "train.checkpoint_every=5", "train.accumulation=2", "train.workers=1", "train.keep_best=true",
    "train.evaluate_every=4", "scoring.prompts=4", "eval.prompts=4", "eval.pictures=2",
    "evaluation.diversity_prompts=2", "evaluation.diversity_seeds=2",
]  # fmt: skip
DECODER = [
    "+experiment=prune_vae", "data.pairs.size=64", "train.steps=16", "train.batch_size=4", "train.checkpoint_every=5",
    "train.accumulation=2", "latents.count=16", "latents.prompts=8", "latents.batch_size=4", "latents.rounds=2",
    "latents.real_share=0.5", "eval.prompts=4", "eval.pictures=2", "decoder.batches=[1]", "latency.iterations=2",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("small", "processes", "kills"),
    [(SMALL, 2, 3), (DISTILLING, 1, 2), (MATCHING, 1, 3), (DECODER, 1, 2), (METHOD, 1, 2)],
    ids=["pruning on two ranks", "distilling", "distribution matching", "decoder", "whole method"],
)
def test_killed_runs_leave_what_a_quiet_run_leaves(tmp_path, tiny_model, small, processes, kills):
    job = [sys.executable, str(ROOT / "scripts/chaos.py"), f"--folder={tmp_path}", f"--kills={kills}", "--seed=1",
           f"--processes={processes}", "--signal=both", "--", *small, *tiny_model]  # fmt: skip
    done = subprocess.run(job, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills, {kills} resumed, all equal" in done.stdout


def test_of_a_model_card_all_but_measured_times_is_compared(tmp_path):
    line = "CLIP +1.65 [+1.04, +2.66], paired; 3.29 [3.17, 3.33] times as fast an image\n- 28 ms an image"
    changes = {"same": ("", ""), "ratio": ("3.29 [3.17", "3.30 [3.16"), "ms": ("28 ms", "31 ms"),
               "score": ("1.65", "1.66"), "interval": ("2.66", "2.67"), "words": ("paired; ", "")}  # fmt: skip
    seen = {}
    for name, (old, new) in changes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(line.replace(old, new) if old else line)
        seen[name] = contents(tmp_path / name)
    assert {name for name, found in seen.items() if found == seen["same"]} == {"same", "ratio", "ms"}
