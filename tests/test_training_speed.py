"""The benchmark of trainings: what it calls a training's memory is the training's."""

import argparse
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/training_speed.py"


@pytest.fixture(scope="module")
def speed():
    return SimpleNamespace(**{"names": runpy.run_path(str(SCRIPT))})


def test_memory_is_read_before_the_matrix_products_that_measure_the_peak(speed, monkeypatch):
    names, order = speed.names["measure"].__globals__, []

    def noted(name, value):
        return lambda *_, **__: order.append(name) or value

    stubs = {
        "teacher_of": noted("teacher", None), "configured": noted("configured", None),
        "model": noted("model", None), "measure_stochastic_depth": noted("trained", (1, 1.0, 1.0)),
        "peak_memory": noted("memory", {"peak_gb": 5e9}), "matmul_peak_tflops": noted("products", 1.0),
    }  # fmt: skip
    for name, stub in stubs.items():
        monkeypatch.setitem(names, name, stub)
    row = names["measure"](argparse.Namespace(precision="no", alone="stochastic_depth", batch=1))
    assert row["peak_gb"] == 5.0 and order[-3:] == ["trained", "memory", "products"]


def test_memory_counts_from_the_end_of_the_first_step(speed, monkeypatch):
    names, resets = speed.names["measure"].__globals__, []
    monkeypatch.setitem(names, "count_memory_from_here", resets.append)
    rates = names["Rates"]("a device")
    for step in range(3):
        rates.log("stage", step, {"samples_per_second": 1.0})
    assert resets == ["a device"] and len(rates.seen) == 3
