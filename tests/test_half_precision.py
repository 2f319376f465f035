"""Teachers in half precision: what is trained beside them and exported is float32."""

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from tests.test_user_errors import JOB

SHORT = ["data.pairs.size=16", "train.steps=2", "train.batch_size=4", "eval.prompts=4", "eval.batch_size=4"]
JOBS = {
    "prune_unet": (["search=manual", "search.method.remove=[mid_block.attentions.0]", *JOB[1:],
                    "objective.teacher_weight=0.5"], "export"),
    "distill_steps": (["+experiment=distill_steps", "distillation.steps=[4,2]", "curves.steps=[2]",
                       "curves.guidance=[2]", "distillation.mode=direct", "eval.pictures=2"], "steps-2/export"),
    "prune_vae": (["+experiment=prune_vae", "latents.count=8", "latents.prompts=4", "latents.steps=1", "eval.steps=1",
                   "latency.iterations=2", "eval.pictures=2"], "export"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("job", JOBS)
def test_every_job_trains_beside_a_teacher_in_half_precision(leave, tiny_model, tmp_path, job, dtype):
    own, export = JOBS[job]
    experiment = [] if own[0].startswith("+") else [JOB[0]]
    code, said = leave(*tiny_model, *experiment, *own, *SHORT, f"model.dtype={dtype}", f"data.cache.folder={tmp_path}")
    assert code in (0, 3), said
    for weights in (tmp_path / "runs").rglob("weights.safetensors"):
        assert {value.dtype for value in load_file(weights).values()} == {torch.float32}, weights
    student = DiffusionPipeline.from_pretrained(tmp_path / "runs" / job / export, trust_remote_code=True)
    assert {student.unet.dtype, student.vae.dtype, student.text_encoder.dtype} == {torch.float32}
    (image,) = student("a b", num_inference_steps=1, height=16, width=16).images
    assert image.size == (16, 16)
