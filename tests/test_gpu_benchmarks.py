"""The script for GPUs, as far as a CPU can prove it, and the random pipelines that it times."""

import json
import sys
from dataclasses import replace

import pytest

import slimstep.models.known as known
import slimstep.models.reference as reference
from scripts.gpu_benchmarks import main
from slimstep.models.pipeline import load_pipeline
from slimstep.prune.family import make_family
from tests.tiny import WIDTH, slow, tiny_sdxl_pipeline, tiny_unet


@pytest.fixture
def small(monkeypatch):
    """The known configurations at small widths."""
    text = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "projection_dim": WIDTH}  # fmt: skip
    vae = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    monkeypatch.setattr(reference, "CLIP_L", text)
    monkeypatch.setattr(reference, "BIG_G", text)
    unets = {"sd15": dict(tiny_unet().config), "sdxl": dict(tiny_sdxl_pipeline().unet.config)}
    for name, unet in unets.items():
        monkeypatch.setitem(reference.CONFIGS, name, {k: v for k, v in unet.items() if not k.startswith("_")})
        monkeypatch.setitem(reference.VAE_CONFIGS, name, reference.VAE_CONFIGS[name] | vae)
        monkeypatch.setitem(known.KNOWN, name, replace(known.KNOWN[name], pixels=64))


@pytest.mark.parametrize("size", ["sd15", *slow("sdxl")])
def test_a_random_pipeline_draws_and_its_kin_are_slimmer(tmp_path, small, size):
    family = {name: load_pipeline(folder) for name, folder in make_family(size, tmp_path).items()}
    for pipeline in family.values():
        (image,) = pipeline("a cat", num_inference_steps=2).images
        assert image.size == (64, 64)
    sizes = {name: (p.unet.num_parameters(), p.vae.num_parameters()) for name, p in family.items()}
    assert sizes["pruned"][0] < sizes["teacher"][0] == sizes["narrow"][0]
    assert sizes["narrow"][1] < sizes["teacher"][1] == sizes["pruned"][1]


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Runs scripts/gpu_benchmarks.py in this process, on the bundled model; its exit code and what it printed."""

    def run(*options):
        places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["gpu_benchmarks.py", "--size", "shapes", "--quick", *options, *places])
        return main(), capsys.readouterr().out

    return run


@pytest.mark.slow
def test_the_script_measures_its_parts_once(tmp_path, script):
    parts = ["--parts", "compile", "training"]
    assert script(*parts)[0] == 0
    compiling, training = (tmp_path / f"out/quick/shapes/{part}.json" for part in parts[1:])
    written = compiling.read_text()
    assert [row["cannot"] for row in json.loads(written)["rows"]] == [None, "CUDA graphs need a CUDA device"]
    rows = json.loads(training.read_text())["rows"]
    assert [row["part"] for row in rows] == ["stochastic_depth", "decoder"]
    for row in rows:
        assert row["samples_per_second"] == pytest.approx(row["batch"] / row["seconds_per_step"])
        assert row["share_of_peak"] == pytest.approx(row["tflops"] / row["matmul_peak_tflops"]) and row["tflops"] > 0
    code, printed = script(*parts)
    assert code == 0 and compiling.read_text() == written and "compile:" not in printed


@pytest.mark.slow
def test_a_script_whose_time_is_up_says_that_it_goes_on(script):
    code, printed = script("--minutes", "0.1")
    assert code == 75 and "goes on with cumulative" in printed
