"""Rows of a benchmark on a device that is not there: compiled, captured, and refused one by one."""

import json

import pytest

TIMES = ["latency.iterations=1", "latency.warmup=1", "benchmark.images=2", "eval.prompts=4", "eval.steps=2"]
ROWS = (
    "benchmark.rows=[{name: float32}, {name: bf16, dtype: bfloat16}, {name: compiled, compile: default}, "
    "{name: captured, capture: true, compile: eager}]"
)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [None, "lcm"])
def test_rows_upon_each_other_compile_and_capture_or_say_why_not(run, tmp_path, scheduler):
    code, _ = run("cumulative", *TIMES, ROWS, *([f"model.scheduler={scheduler}"] if scheduler else []))
    assert code == 0
    rows = {row["name"]: row for row in map(json.loads, (p.read_text() for p in tmp_path.glob("runs/*/rows/*.json")))}
    assert len(rows) == 4
    refused = {name: row["cannot"] for name, row in rows.items() if row["cannot"]}
    if scheduler is None:
        assert not refused
    else:
        assert list(refused) == ["captured"] and "LCMScheduler cannot be one CUDA graph" in refused["captured"]
