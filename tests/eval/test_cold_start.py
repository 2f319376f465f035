"""A process that cannot costs its own row, which says why in a line; others go on."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import InductorError

import slimstep.eval.timing.cold_start as cold_start
from slimstep.eval.pages.speed_page import cold_start_table
from slimstep.eval.timing.child import child_result, reason_in
from slimstep.eval.timing.cold_start import compile_cost
from slimstep.eval.timing.inference import CannotRunError
from slimstep.eval.timing.speed import reason

CANNOT = [
    ("raise MemoryError('no more')", ["exit code 1", "MemoryError: no more"]),
    ("raise RuntimeError('first line\\n\\nSet X=1 for more\\n')", ["RuntimeError: first line"]),
    ("try:\n    1 / 0\nexcept Exception as early:\n    raise ValueError('it is later') from early", ["is later"]),
    ("import os; os.kill(os.getpid(), 9)", ["SIGKILL", "memory"]),
    ("import os; os.kill(os.getpid(), 11)", ["SIGSEGV"]),
    ("import os; os.kill(os.getpid(), 40)", ["signal 40"]),
    ("import sys; print('only this', file=sys.stderr); sys.exit(7)", ["exit code 7", "only this"]),
    ("import sys; sys.exit(7)", ["exit code 7", "said nothing"]),
    ("pass", ["without a result"]),
    ("print('{broken')", ["without a result"]),
    ("print('[1]')", ["without a result"]),
    ("import sys; sys.stderr.buffer.write(bytes([255, 254])); sys.exit(1)", ["exit code 1"]),
    (f"raise RuntimeError('{'long ' * 1000}')", ["RuntimeError: long"]),
]


@pytest.mark.parametrize(("program", "reasons"), CANNOT)
def test_a_process_that_cannot_says_why_in_one_line(program, reasons):
    with pytest.raises(CannotRunError) as raised:
        child_result([sys.executable, "-c", program])
    line = str(raised.value)
    assert all(reason in line for reason in reasons) and "\n" not in line and len(line) < 500


def test_the_last_line_is_the_result():
    assert child_result([sys.executable, "-c", "print('loading'); print('{\"ms\": 3}')"]) == {"ms": 3}


def test_notes_after_an_exception_are_not_its_reason():
    said = "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory.\n\nYou can\nhelp"
    assert reason_in(said) == "torch.OutOfMemoryError: CUDA out of memory."


OutOfResources = type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})
REFUSED = [
    CannotRunError("why"), torch.OutOfMemoryError("CUDA out of memory.\nTried"), NotImplementedError("no kernel"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), RuntimeError("GET was unable to find an engine to run"),
    OutOfResources("out of resource: shared memory, Required: 200000"), InductorError(ValueError("a"), "b"),
]  # fmt: skip


@pytest.mark.parametrize("error", REFUSED, ids=lambda error: type(error).__name__)
def test_what_a_device_cannot_do_is_the_rows_reason_in_one_line(error):
    assert reason(error) and "\n" not in reason(error)


@pytest.mark.parametrize("error", [
    ValueError("latency.x=3 is not supported"), RuntimeError("The size of tensor a must match"), KeyError("unet"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
])  # fmt: skip
def test_a_fault_of_ours_is_not_a_reason(error):
    assert reason(error) is None


GOOD = {"first_s": 2.0, "steady_ms": 10.0, "artifact_bytes": 5}
FAILED = {"cannot": "its own process was killed by SIGKILL: it said nothing"}
REQUEST = {"inference": {"compile": "default"}}


def kind(request):
    if request["inference"]["compile"] == "eager":
        return "eager"
    return "cold" if "save" in request else "artifacts" if "load" in request else "kept_cache"


def cost_where(monkeypatch, tmp_path, failing):
    """What compiling costs where the processes of these kinds fail, and the kinds that were started."""
    started = []

    def process(request, cache):
        started.append(kind(request))
        if "save" in request and "cold" not in failing:
            Path(request["save"]).touch()
        return FAILED if kind(request) in failing else {**GOOD, "steady_ms": 30.0 if kind(request) == "eager" else 10.0}

    monkeypatch.setattr(cold_start, "new_process", process)
    return compile_cost(REQUEST, tmp_path / "artifacts.bin"), started


@pytest.mark.parametrize("failing", [(), ("eager",), ("cold",), ("artifacts",), ("kept_cache",), ("eager", "cold")])
def test_a_way_that_failed_says_so_and_the_page_is_drawn(monkeypatch, tmp_path, failing):
    cost, started = cost_where(monkeypatch, tmp_path, failing)
    assert {name for name, way in cost.items() if way == FAILED} == set(failing)
    assert len(started) == (2 if "cold" in failing else 4)  # what has failed to compile is not compiled again
    for name in {"cold", "artifacts", "kept_cache"} - set(failing):
        assert cost[name] is None or cost[name]["calls"] == (None if "eager" in failing else 0)
    row = {"model": "teacher", "steps": 8, "batch": 1, "name": "compile", "first_image": json.loads(json.dumps(cost))}
    table = cold_start_table({"rows": [row]})
    (line,) = table.rows
    assert len(line) == len(table.header) and sum("SIGKILL" in cell for cell in line) == len(failing)


def test_a_process_that_dies_is_the_row_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "exit code 1" in cold_start.new_process(REQUEST, tmp_path)["cannot"]


def test_a_new_process_begins_where_this_checkout_lies(monkeypatch, tmp_path):
    """Elsewhere it would find the modules of an installed copy, or none."""
    requested = {}
    monkeypatch.setattr(cold_start, "child_result", lambda command, **options: requested.update(options) or {})
    cold_start.new_process({}, tmp_path)
    assert (Path(requested["cwd"]) / "train.py").is_file()
