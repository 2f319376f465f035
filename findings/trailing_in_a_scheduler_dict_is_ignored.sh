#!/usr/bin/env bash
# Library: diffusers 0.42.1 with torch 2.14.1.
#
# A scheduler file that names no timestep_spacing is loaded, as Stable Diffusion 1.5's does not name one. A second
# scheduler is to have trailing spacing. There are two ways to write that:
#     from_config(config, timestep_spacing="trailing")
#     from_config({**config, "timestep_spacing": "trailing"})
#
# A good guess: both are the same.
#
# What really happens: the second is ignored without a word, even for the class it was loaded with. A loaded config
# holds a list `_use_default_values` of the fields that its file left out. The new dictionary inherits the list, and
# `from_config` drops every field named there, the one just set included. Any other such field shares this fate, so
# `prediction_type="v_prediction"` is lost too.
#
# Whom it concerns: everybody who samples few-step students, or evaluates at few steps, with a config that was changed
# as a dictionary. Trailing starts at 999, and DDIM here at 751, where the student was never trained.
#
# What to do instead: give changes as keyword arguments, or drop `_use_default_values` from the dictionary. The latter
# also keeps the other fields at what the loaded scheduler uses.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 diffusers==0.42.1 numpy==2.4.6

cat > "$tmp/finding.py" <<'PYTHON'
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

for package in ("torch", "diffusers"):
    print(package, version(package))

FILE = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "clip_sample": False,
}
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "scheduler_config.json").write_text(json.dumps(FILE))
    config = DDIMScheduler.from_pretrained(folder).config

changed = {**config, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
freed = {key: value for key, value in changed.items() if key != "_use_default_values"}


def steps(scheduler):
    scheduler.set_timesteps(4)
    return [int(t) for t in scheduler.timesteps]


for cls, ignored in (
    (DDIMScheduler, [751, 501, 251, 1]),
    (EulerDiscreteScheduler, [999, 666, 333, 0]),
    (DPMSolverMultistepScheduler, [999, 749, 500, 250]),
):
    keyword = cls.from_config(config, timestep_spacing="trailing", prediction_type="v_prediction")
    dictionary = cls.from_config(changed)
    without_list = cls.from_config(freed)
    print(cls.__name__)
    for name, scheduler in (("keyword", keyword), ("dictionary", dictionary), ("without list", without_list)):
        print(f"  {name:13}{steps(scheduler)}", scheduler.config.timestep_spacing, scheduler.config.prediction_type)
    assert steps(keyword) == steps(without_list) == [999, 749, 499, 249]
    assert steps(dictionary) == ignored, steps(dictionary)
    assert dictionary.config.prediction_type == "epsilon"
    assert keyword.config.prediction_type == without_list.config.prediction_type == "v_prediction"
print("timestep_spacing and prediction_type that were set in the dictionary are ignored.")
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
