"""Students whose linear layers compute in int8: every objective trains the network that is exported."""

import json

import pytest
import torch

from slimstep.distill.network import in_low_precision
from slimstep.eval.record import read_evaluation
from slimstep.models.families.quantized import QuantizedLinear
from slimstep.models.networks import network_of
from slimstep.models.pipeline import load_pipeline
from tests.distill.test_steps_job import assert_drawn_alike_elsewhere, pruned, run  # noqa: F401
from tests.tiny import slow

INT8 = "distillation.quantize=int8"


def quantized_layers(network):
    return {name for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.fixture(scope="module")
def teacher(tiny_pipeline_folder):
    return network_of(load_pipeline(tiny_pipeline_folder))


def test_layers_for_tokens_compute_in_int8_and_keep_their_float_weights(teacher):
    student = in_low_precision(teacher, "int8")
    assert set(student.architecture) == set(teacher.quantizable_blocks)
    layers = quantized_layers(student)
    assert any("attn1.to_q" in name for name in layers) and not any("time_emb" in name for name in layers)
    ours = student.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in teacher.state_dict().items())
    assert quantized_layers(in_low_precision(student, "int8")) == layers and not quantized_layers(teacher)


def test_what_a_student_lacks_or_has_narrower_stays_so(teacher):
    first, second = teacher.quantizable_blocks[:2]
    smaller = teacher.with_architecture({first: 0, second: {"widths": {"ff": 0.5}}})
    student = in_low_precision(smaller, "int8").architecture
    assert student[first].repeats == 0 and student[first].dtype is None
    assert student[second].dtype == "int8" and student[second].widths == {"ff": 0.5}


@pytest.mark.parametrize("objective", ["guidance", *slow("steps", "lcm", "dmd", "tdm", "adversarial", "scm")])
def test_every_objective_trains_int8_students_that_travel(tmp_path, tiny_model, tiny_pipeline_folder, objective):
    grid = "[4,2]" if objective == "lcm" else "[4,2,1]"
    job = [*tiny_model, f"root={tmp_path}", f"objective={objective}", f"distillation.steps={grid}", INT8]
    job += ["distillation.sampler=LCMScheduler"] * (objective in ("lcm", "scm"))
    job += ["distillation.guidance_embed_dim=32"] * (objective == "lcm")
    done = run(*job, "train.learning_rate=1e-3", "train.warmup_steps=0")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "distill_steps"
    student = network_of(load_pipeline(path / "steps-2/export"))
    assert quantized_layers(student) and {spec.dtype for spec in student.architecture.values()} == {"int8"}
    before, after = network_of(load_pipeline(tiny_pipeline_folder)).state_dict(), student.state_dict()
    weights = [f"{name}.weight" for name in quantized_layers(student)]
    assert all(not torch.equal(before[name], after[name]) for name in weights)
    assert all(name.startswith("steps-") or name.startswith("teacher") for name in {p.model for p in
               read_evaluation(path).points})  # fmt: skip
    if objective not in ("lcm", "scm"):  # whose samplers draw noise of their own
        guidance = 2.5 if objective == "steps" else 1.0
        assert_drawn_alike_elsewhere(path / "steps-2/export", 2, tmp_path, guidance)


def test_what_was_pruned_is_quantized_beside_its_removals(pruned, tiny_clip_folder, tmp_path):  # noqa: F811
    model = ["model=path", f"model.name_or_path={pruned / 'teacher'}", f"root={tmp_path}"]
    scorer = [f"scorer.model=local-dir:{tiny_clip_folder}", "scorer.force=true"]
    done = run(*model, *scorer, f"distillation.student={pruned / 'student'}", "distillation.steps=[4,2]", INT8)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "distill_steps/steps-2/export/unet/config.json").read_text())
    removed = config["depths"].pop("mid_block.attentions.0")
    assert removed == 0 and {entry["dtype"] for entry in config["depths"].values()} == {"int8"}


@pytest.mark.parametrize(("override", "message"), [
    ("train.lora_rank=2", "distillation.quantize=int8 and train.lora_rank=2 of steps-2"),
    ("distillation.quantize=int4", "distillation.quantize=int4 must be null or one of int8, fp8"),
    ("distillation.quantize=fp8", "fp8 needs a CUDA device"),
])  # fmt: skip
def test_what_cannot_be_trained_in_low_precision_is_named(tmp_path, tiny_model, override, message):
    refused = run(*tiny_model, f"root={tmp_path}", "distillation.steps=[4,2]", INT8, override)
    assert refused.returncode == 1 and message in refused.stderr, refused.stderr
