"""Plans of models at full size, from their configurations alone."""

import pytest
import torch
from omegaconf import OmegaConf

from slimstep.eval.given import given_models
from slimstep.eval.memory_plan import GPUS, MemoryNeed, smaller, weight_lines
from slimstep.models.cost import count_parameters
from slimstep.models.described import DESCRIBED, described_pipeline
from slimstep.models.family import denoiser_of, family_of
from slimstep.models.memory import Needed
from tests.jobs import run_job
from tests.tiny import small_pipeline
from tests.user_errors import error_line

# 12, 8.1, 0.6, 5 and 5
BILLIONS = {"flux_dev": 11.90, "sd35_large": 8.06, "pixart_sigma": 0.61, "cogvideox_5b": 5.57, "cogvideox_5b_i2v": 5.57}
BLOCKS = {"flux_dev": 57, "sd35_large": 38, "pixart_sigma": 28, "cogvideox_5b": 42, "cogvideox_5b_i2v": 42}
TOKENS = {"flux_dev": 512, "sd35_large": 333, "pixart_sigma": 300, "cogvideox_5b": 226, "cogvideox_5b_i2v": 226}


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_described_pipeline_has_the_size_of_the_published_one_and_no_weights(name):
    pipeline = described_pipeline(name)
    transformer = pipeline.transformer
    assert count_parameters(transformer) / 1e9 == pytest.approx(BILLIONS[name], abs=0.005)
    size = (13, 60, 90) if name.startswith("cogvideox_5b") else (128, 128)
    assert len(transformer.blocks) == BLOCKS[name] and denoiser_of(transformer).sample_shape[1:] == size
    assert all(parameter.is_meta for parameter in transformer.parameters())
    assert family_of(pipeline).tokens(pipeline) == TOKENS[name]


def test_an_unknown_name_lists_those_that_are_described():
    with pytest.raises(ValueError, match="'flux' is described.*|described as 'flux'; choose from .*flux_dev"):
        described_pipeline("flux")


NEED = MemoryNeed(
    parameters=10**10, sample=lambda checkpointing, is_half: Needed(10**9, 2 * 10**9 if checkpointing else 10**11),
    batch=8, optimizer="adamw", has_ema=True, checkpointing=False, is_half=False,
)  # fmt: skip


def test_memory_is_what_each_weight_and_sample_takes():
    assert NEED.parts == {"weights, gradients": 8e10, "optimizer": 8e10, "EMA": 4e10, "teacher": 4e10,
                          "activations": 8e11}  # fmt: skip
    steps = dict(smaller(NEED))
    low_rank = steps.pop("train.lora_rank=64 (not with +hardware=fsdp)")
    assert low_rank.parts["weights, gradients"] == 4e10 and low_rank.parts["optimizer"] == low_rank.parts["EMA"] == 0
    totals = [need.total for need in steps.values()]
    assert totals == sorted(totals, reverse=True) and totals[0] == NEED.total
    assert steps["train.optimizer=adamw8bit"].parts["optimizer"] == 2e10
    last = [*steps.values()][-1]
    assert last.shards == 8 and GPUS[0] * 1e9 < last.total < GPUS[1] * 1e9, "the teacher is on every GPU"


def test_drawing_takes_the_weights_and_text_encoders_only_while_they_encode():
    lines = weight_lines(described_pipeline("flux_dev"))
    denoiser, vae, texts = 4 * 11.90, 0.335, 4 * (4.76 + 0.123)  # T5-XXL's encoder and CLIP-L, in 10⁹ parameters
    assert lines[0].startswith(f"drawing    {denoiser + vae:.1f} GB of weights on the device: {denoiser:.1f} GB den")
    assert f"{denoiser + vae + texts:.1f} GB while prompts are encoded" in lines[1]
    assert f"{texts:.1f} GB of text encoders then rest in the host's memory" in lines[1]
    half = weight_lines(small_pipeline().to(dtype=torch.float16))
    whole = weight_lines(small_pipeline())
    assert "half of it with model.dtype=bfloat16" in whole[0] and "half" not in half[0]


NEED_WEIGHTS = {
    "evaluate": [], "benchmark": [], "pipelines": [], "cumulative": [], "latency_table": [], "prune_transformer": [],
    "distill_steps": [], "prune_vae": ["plan=true"], "cache_latents": ["plan=true"],
}  # fmt: skip


@pytest.mark.parametrize("experiment", NEED_WEIGHTS)
def test_what_needs_weights_refuses_a_configuration_by_name(experiment, tmp_path):
    options = [f"root={tmp_path}", *NEED_WEIGHTS[experiment]]
    done = run_job(f"+experiment={experiment}", "model=pixart_sigma_described", *options)
    error = error_line(done.returncode, done.stderr)
    assert "model.name_or_path=pixart_sigma is a configuration alone" in error
    assert "plan=true of prune_transformer" in error and "model=path model.name_or_path=FOLDER" in error
    assert not [*tmp_path.rglob("*.json")], "nothing was made"


def test_other_models_are_evaluated_beside_it():
    """`model` is read of models alone that it names."""
    config = OmegaConf.create({
        "model": {"_target_": "slimstep.models.described.described_pipeline", "name_or_path": "flux_dev"},
        "models": {"a": "somewhere"}, "data": {"resolution": 16},
    })  # fmt: skip
    assert given_models(config, [4], "evaluate").paths == {"a": "somewhere"}
    config.models = None
    with pytest.raises(ValueError, match="flux_dev is a configuration alone"):
        given_models(config, [4], "evaluate")


def test_a_plan_needs_no_weights():
    done = run_job("+experiment=prune_transformer", "model=pixart_sigma_described", "plan=true")
    assert done.returncode == 0 and "teacher    610.9 M parameters, 28 blocks" in done.stdout
    assert "how long they take is measured where the weights are" in done.stdout
    assert "fits into  24 GB with" in done.stdout and "train.gradient_checkpointing=true" in done.stdout
    assert "drawing    2.78 GB of weights" in done.stdout and "19 GB of text encoders then rest" in done.stdout
    assert "for an evaluation of one image" in done.stdout and "with model.vae_tiling=true" in done.stdout
