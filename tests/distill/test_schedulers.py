"""The ladder's schedulers, made from whatever a teacher ships with."""

import json
import re
from types import SimpleNamespace

import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from omegaconf import OmegaConf

from slimstep.distill.bench import DistillBench
from slimstep.distill.config import LadderConfig
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.guidance import with_guidance_embedding
from slimstep.models.pipeline import load_pipeline, with_unet
from slimstep.prune.bench import PruneBench
from tests.tiny import tiny_pipeline, tiny_unet

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SHIPPED = {  # what the files of Stable Diffusion 1.5 and XL say; the first names neither prediction type nor spacing
    PNDMScheduler: {**BETAS, "skip_prk_steps": True},
    EulerDiscreteScheduler: {**BETAS, "timestep_spacing": "leading", "prediction_type": "epsilon"},
}


@pytest.mark.parametrize("kind", SHIPPED)
def test_what_a_file_leaves_open_is_the_ladders_to_say(kind, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": kind.__name__, **SHIPPED[kind]}))
    bench = object.__new__(DistillBench)
    bench.ladder = LadderConfig()
    teacher = bench.on_the_grid(DDIMScheduler, kind.from_pretrained(tmp_path))
    bench.pipeline = SimpleNamespace(scheduler=teacher)
    assert not bench.predicts_velocity and teacher.config.timestep_spacing == "trailing"
    config = bench.scheduler.config
    assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")
    assert config.set_alpha_to_one and not config.clip_sample and config.beta_start == BETAS["beta_start"]


def bench_of(folder, **model):
    """The ladder's bench with the pipeline in a folder as teacher, and as student."""
    bench = object.__new__(DistillBench)
    bench.ladder, teacher = LadderConfig(student=str(folder)), load_pipeline(folder, **model)
    teacher.scheduler = bench.on_the_grid(DDIMScheduler, teacher.scheduler)
    bench.pipeline, bench.config = teacher, OmegaConf.create({"model": {"name_or_path": str(folder), **model}})
    return bench


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, DDIMScheduler])
def test_a_student_with_zero_terminal_snr_fits_its_own_teacher(kind, tmp_path):
    pipeline = tiny_pipeline("v_prediction")
    pipeline.scheduler = kind(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipeline.save_pretrained(tmp_path)
    bench = bench_of(tmp_path)
    assert bench.pipeline.scheduler.alphas_cumprod[-1] == 0
    assert bench.given_student().config.sample_size == bench.teacher.config.sample_size


def test_a_student_is_asked_for_the_teachers_size_also_where_its_weights_are_of_old_diffusers(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.unet.register_to_config(_diffusers_version="0.6.0")
    pipeline.save_pretrained(tmp_path)
    config = tmp_path / "unet/config.json"
    config.write_text(re.sub(r'("_diffusers_version": )"[^"]*"', r'\1"0.6.0"', config.read_text()))
    bench = bench_of(tmp_path)
    bench.teacher.register_to_config(sample_size=4)
    assert with_unet(bench.pipeline, bench.given_student()).unet.config.sample_size == 4


def test_the_teacher_as_its_own_student_is_read_in_the_same_way(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path, variant="fp16")
    assert bench_of(tmp_path, variant="fp16").given_student() is not None


def test_what_only_another_solver_reads_is_not_handed_on():
    bench = object.__new__(DistillBench)
    bench.ladder = LadderConfig()
    given = DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++")
    ddim = bench.on_the_grid(DDIMScheduler, given)
    assert not bench.on_the_grid(EulerDiscreteScheduler, ddim).config.use_karras_sigmas
    assert bench.on_the_grid(DPMSolverMultistepScheduler, ddim).config.algorithm_type == "dpmsolver++"


def test_a_teacher_that_is_told_its_guidance_is_refused_where_nothing_tells_it():
    told = with_guidance_embedding(PrunableUNet2DConditionModel.from_unet(tiny_unet()), 32)
    ladder, pruning = object.__new__(DistillBench), object.__new__(PruneBench)
    ladder.config = OmegaConf.create({"objective": {"_target_": "slimstep.distill.steps.StepDistillation"}})
    ladder.ladder, ladder.climbs = LadderConfig(), ()
    pruning.config = OmegaConf.create({"model": {"name_or_path": "lcm"}})
    scheduler = DDIMScheduler(**BETAS, prediction_type="v_prediction")
    ladder.pipeline = pruning.pipeline = SimpleNamespace(unet=told, scheduler=scheduler)
    ladder.networks = {"teacher": told, "student": told}
    refused = "is told to the teacher and student, and {} would not tell it"
    with pytest.raises(ValueError, match=refused.format("objective StepDistillation")):
        ladder.check_agreement()
    ladder.config.objective = {"_target_": "slimstep.distill.guidance.GuidanceDistillation"}
    ladder.ladder = LadderConfig(guidance_width=32)
    ladder.check_agreement()
    ladder.ladder = LadderConfig(student="cut", guidance_width=32, repair=True)
    scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(ValueError, match=refused.format("learning to predict v and ladder.repair")):
        ladder.check_agreement()
    with pytest.raises(ValueError, match="lcm is told its guidance scale: prune it before that"):
        pruning.check()
