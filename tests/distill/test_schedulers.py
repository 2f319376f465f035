"""The ladder's schedulers, made from whatever a teacher ships with."""

import json
from types import SimpleNamespace

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from distill.bench import DistillBench
from engine.sections.stepping import LadderConfig

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
