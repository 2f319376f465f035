"""The precision that images are drawn in: what is chosen where, what it does, and that every protocol says it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from slimstep.data.prompts import PromptSet
from slimstep.engine.run import differences
from slimstep.eval.config import DrawingConfig
from slimstep.eval.latents import sampled_latents
from slimstep.eval.pages.comparison import metric, protocol_differences
from slimstep.eval.sampling import Sampler
from slimstep.eval.timing.precision import products, settled
from tests.tiny import small_pipeline
from tests.user_errors import error_line

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PROMPTS = ["a cat", "two dogs"]


@pytest.fixture
def capability(monkeypatch):
    """Says what the CUDA device can do."""
    return lambda *version: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline("epsilon")


@pytest.mark.parametrize(
    ("version", "chosen"), [((7, 5), "float32"), ((8, 0), "tf32"), ((8, 9), "tf32"), ((12, 0), "tf32")]
)
def test_tf32_is_the_default_where_a_gpu_has_it(capability, version, chosen):
    capability(*version)
    assert settled(None, GPU) == chosen and settled(None, CPU) == "float32"
    assert settled("float32", GPU) == "float32" and settled("bfloat16", GPU) == "bfloat16"


def test_tf32_is_refused_where_it_is_not(capability, leave, tiny_model):
    capability(7, 0)
    for device in (GPU, CPU):
        with pytest.raises(
            ValueError, match="tf32 needs a CUDA device of compute capability 8.0, and this is cuda:0|cpu"
        ):
            settled("tf32", device)
    for experiment in ("prune_unet", "prune_vae", "distill_steps", "evaluate"):
        message = error_line(*leave(f"+experiment={experiment}", *tiny_model, "sampling.precision=tf32"))
        assert "sampling.precision=tf32 needs a CUDA device" in message


@pytest.mark.parametrize("wrong", ["float16", "TF32", "", "no"])
def test_an_unknown_precision_is_named(wrong):
    with pytest.raises(ValueError, match=f"sampling.precision='{wrong}' is unknown; choose from"):
        DrawingConfig(wrong)


def flags():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("precision", "inside"), [
    ("float32", ("highest", False)), ("tf32", ("high", True)), ("bfloat16", ("high", True)),
])  # fmt: skip
def test_unet_and_decoder_compute_in_it_and_nothing_else_does(pipeline, monkeypatch, precision, inside):
    """On a device that has TF32, as far as torch's switches tell."""
    monkeypatch.setattr("slimstep.eval.timing.precision.has_tf32", lambda device: True)
    seen, before = [], flags()
    handles = [
        network.register_forward_hook(lambda *_: seen.append(flags()))
        for network in (pipeline.unet, pipeline.vae.decoder)
    ]
    Sampler(pipeline, 2, 1.0, precision=precision).images(pipeline.unet, PROMPTS, [0, 1])
    for handle in handles:
        handle.remove()
    assert seen == [inside] * 3 and flags() == before


def test_the_switches_come_back_after_an_error():
    before = flags()
    with pytest.raises(KeyError), products(tf32=True):
        raise KeyError
    assert flags() == before


def test_bfloat16_is_the_unets_and_latents_stay_float32(pipeline):
    texts, noise = Sampler(pipeline, 2, 2.0).encode(PROMPTS), torch.randn(2, 4, 8, 8)
    exact, half = (
        Sampler(pipeline, 2, 2.0, precision=precision).denoise(pipeline.unet, texts, noise)
        for precision in ("float32", "bfloat16")
    )
    assert half.dtype == exact.dtype == torch.float32
    assert not torch.equal(half, exact) and (half - exact).abs().max() < 0.1 * exact.abs().max()


def test_every_protocol_says_it(pipeline):
    for precision in ("float32", "tf32", "bfloat16"):
        assert Sampler(pipeline, 2, 1.0, precision=precision).protocol["precision"] == precision
    halved = small_pipeline("epsilon").to(torch.bfloat16)
    assert Sampler(halved, 2, 1.0, precision="tf32").protocol["precision"] == "bfloat16"  # of its weights


def test_scores_of_before_there_was_a_choice_are_compared_with_float32_ones():
    protocols = {
        "old": {"steps": 2},
        "new": {"steps": 2, "precision": "float32"},
        "other": {"steps": 2, "precision": "tf32"},
    }
    evaluations = {name: SimpleNamespace(prompts_hash="0", protocol=p) for name, p in protocols.items()}
    metrics = {name: metric(SimpleNamespace(evaluation=own)) for name, own in evaluations.items()}
    differing = protocol_differences(metrics)
    assert differing == ["other was scored with other precision"]


def test_a_run_from_before_there_was_a_choice_goes_on_and_another_precision_is_another_run():
    old = {"eval": {"steps": 2}}
    assert differences(old, {**old, "sampling": {"precision": None}}) == {}
    assert differences(old, {**old, "sampling": {"precision": "tf32"}}) == {"sampling.precision": (None, "tf32")}
    assert differences({"a": {"b": None}}, {"a": 3}) == {"a": ({"b": None}, 3)}


def test_latents_cached_in_float32_are_found_and_not_taken_for_others(pipeline, tmp_path):
    folders = {}
    for precision in ("float32", "bfloat16"):
        sampler = Sampler(pipeline, 1, 1.0, precision=precision)
        made = sampled_latents(sampler, pipeline.unet, PromptSet(("a",), "one"), 1, 1, tmp_path, Accelerator(cpu=True))
        folders[precision] = made.made_from
    assert "precision" not in folders["float32"] and folders["bfloat16"]["precision"] == "bfloat16"
