"""The schedulers of a distillation, made from whatever a teacher ships with."""

import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from omegaconf import OmegaConf

from slimstep.distill.checks import check_agreement
from slimstep.distill.config import DistillationConfig
from slimstep.distill.network import Distillation, on_the_grid, student_of
from slimstep.distill.stages import distillation_stages
from slimstep.eval.inputs import Teacher
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.guidance import with_guidance_embedding
from slimstep.models.pipeline import load_pipeline, with_unet
from tests.tiny import tiny_pipeline, tiny_unet

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SHIPPED = {  # what the files of Stable Diffusion 1.5 and XL say; the first names neither prediction type nor spacing
    PNDMScheduler: {**BETAS, "skip_prk_steps": True},
    EulerDiscreteScheduler: {**BETAS, "timestep_spacing": "leading", "prediction_type": "epsilon"},
}


@pytest.mark.parametrize("kind", SHIPPED)
def test_what_a_file_leaves_open_is_for_the_step_schedule_to_say(kind, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": kind.__name__, **SHIPPED[kind]}))
    scheduler = on_the_grid(DistillationConfig(), DDIMScheduler, kind.from_pretrained(tmp_path))
    teacher = Teacher(SimpleNamespace(scheduler=scheduler), None, None)
    job = Distillation(teacher, DistillationConfig(), (), None)
    assert not job.predicts_v and scheduler.config.timestep_spacing == "trailing"
    config = job.scheduler.config
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")
    assert config.set_alpha_to_one and not config.clip_sample and config.beta_start == BETAS["beta_start"]


def teacher_of(folder, **model) -> tuple[Teacher, DistillationConfig]:
    """The pipeline in a folder as teacher on the time grid, and a distillation with it as student."""
    config, pipeline = DistillationConfig(student=str(folder)), load_pipeline(folder, **model)
    pipeline.scheduler = on_the_grid(config, DDIMScheduler, pipeline.scheduler)
    return Teacher(pipeline, OmegaConf.create({"model": {"name_or_path": str(folder), **model}}), None), config


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, DDIMScheduler])
def test_a_student_with_zero_terminal_snr_fits_its_own_teacher(kind, tmp_path):
    pipeline = tiny_pipeline("v_prediction")
    pipeline.scheduler = kind(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipeline.save_pretrained(tmp_path)
    teacher, config = teacher_of(tmp_path)
    assert teacher.pipeline.scheduler.alphas_cumprod[-1] == 0
    assert student_of(teacher, config)[0].config.sample_size == teacher.unet.config.sample_size


def test_a_student_is_asked_for_the_teachers_size_also_where_its_weights_are_of_old_diffusers(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.unet.register_to_config(_diffusers_version="0.6.0")
    pipeline.save_pretrained(tmp_path)
    config = tmp_path / "unet/config.json"
    config.write_text(re.sub(r'("_diffusers_version": )"[^"]*"', r'\1"0.6.0"', config.read_text()))
    teacher, config = teacher_of(tmp_path)
    teacher.unet.register_to_config(sample_size=4)
    assert with_unet(teacher.pipeline, student_of(teacher, config)[0]).unet.config.sample_size == 4


def test_the_teacher_as_its_own_student_is_read_in_the_same_way(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path, variant="fp16")
    assert student_of(*teacher_of(tmp_path, variant="fp16"))[0] is not None


def test_what_only_another_solver_reads_is_not_handed_on():
    grid = partial(on_the_grid, DistillationConfig())
    given = DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++")
    ddim = grid(DDIMScheduler, given)
    assert not grid(EulerDiscreteScheduler, ddim).config.use_karras_sigmas
    assert grid(DPMSolverMultistepScheduler, ddim).config.algorithm_type == "dpmsolver++"


def test_a_guidance_embedding_is_refused_where_nothing_would_train_it():
    embedded = with_guidance_embedding(PrunableUNet2DConditionModel.from_unet(tiny_unet()), 32)
    scheduler = DDIMScheduler(**BETAS, prediction_type="v_prediction")
    steps, guidance = ({"_target_": f"slimstep.distill.{name}"} for name in (
        "steps.StepDistillation", "guidance.GuidanceDistillation"))  # fmt: skip

    def job(objective, distillation):
        config = OmegaConf.create({"objective": objective, "model": {"name_or_path": "lcm"}})
        teacher = Teacher(SimpleNamespace(unet=embedded, scheduler=scheduler), config, None)
        return Distillation(teacher, distillation, (), embedded)

    refused = "the teacher and student has a guidance embedding, and {} would not train it"
    with pytest.raises(ValueError, match=refused.format("objective StepDistillation")):
        check_agreement(job(steps, DistillationConfig()))
    check_agreement(job(guidance, DistillationConfig(guidance_embed_dim=32)))
    scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(ValueError, match=refused.format("the conversion to v-prediction and distillation.recover")):
        check_agreement(job(guidance, DistillationConfig(student="cut", guidance_embed_dim=32, recover=True)))


def test_a_student_with_guidance_of_its_own_is_exported_and_compared_at_that():
    """And not at the scale of the evaluation; one that guides itself is called without any."""
    unet, scheduler = tiny_unet(), DDIMScheduler(**BETAS, prediction_type="v_prediction")

    def job(name):
        objective = {"_target_": f"slimstep.distill.{name}", "guidance_scale": 4.0}
        config = OmegaConf.create({"objective": objective, "eval": {"guidance_scale": 2.5}})
        teacher = Teacher(SimpleNamespace(unet=unet, scheduler=scheduler), config, None)
        return Distillation(teacher, DistillationConfig(), distillation_stages([4, 1], "direct", True), unet)

    dmd, steps = job("dmd.DistributionMatching"), job("steps.StepDistillation")
    assert [one.compared_guidance("steps-1") for one in (dmd, steps)] == [4.0, 2.5]
    assert [one.sampled_guidance("steps-1", one.compared_guidance("steps-1")) for one in (dmd, steps)] == [1.0, 2.5]
    assert [one.sampled_guidance("teacher", 2.5) for one in (dmd, steps)] == [2.5, 2.5]
