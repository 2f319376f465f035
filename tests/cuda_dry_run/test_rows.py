"""Rows of a benchmark on a device that is not there: compiled, captured, and refused one by one."""

import json

import pytest

TIMES = ["latency.iterations=1", "latency.warmup=1", "benchmark.images=2", "eval.prompts=4", "eval.steps=2"]
ROWS = (
    "benchmark.rows=[{name: float32}, {name: bf16, dtype: bfloat16}, {name: compiled, compile: default}, "
    "{name: captured, capture: true, compile: eager}]"
)


@pytest.mark.slow
def test_rows_upon_each_other_compile_and_capture(run, tmp_path):
    assert reasons(run, tmp_path, ROWS) == dict.fromkeys(("float32", "bf16", "compiled", "captured"))


@pytest.mark.slow
def test_a_scheduler_that_cannot_be_captured_is_refused_its_row(run, tmp_path):
    rows = "benchmark.rows=[{name: captured, dtype: bfloat16, capture: true, compile: eager}]"
    assert "LCMScheduler cannot be one CUDA graph" in reasons(run, tmp_path, rows, "model.scheduler=lcm")["captured"]


def reasons(run, tmp_path, *overrides):
    """Why each row could not run; None where it could."""
    code, _ = run("cumulative", *TIMES, *overrides)
    assert code == 0
    rows = map(json.loads, (path.read_text() for path in tmp_path.glob("runs/*/rows/*.json")))
    return {row["name"]: row["cannot"] for row in rows}
