#!/usr/bin/env bash
# Library: diffusers 0.42.1, with torch 2.14.1.
#
# Students of few steps are trained at the starts of "trailing" steps: of four at 999, 749, 499 and 249 (SDXL-Turbo,
# SDXL-Lightning, DMD2). DMD2's and LCM's way of sampling, with new noise between the steps, is LCMScheduler's.
#
# A good guess: LCMScheduler and TCDScheduler with timestep_spacing="trailing" start four steps at these timesteps, as
# DDIM, Euler, Euler ancestral, DPM-Solver++ and UniPC do.
#
# What really happens: both keep `timestep_spacing` in their configuration and never read it. They take every k-th of
# `original_inference_steps`, 50 unless it is said: 999, 759, 499 and 259, and of eight 999, 879, 759, 639, 499, 379, 259
# and 139. One and two steps are equal, so that a try at these shows nothing. There is no message. from_config of another
# scheduler, which is how a pipeline's is swapped, takes "trailing" over and looks right.
#
# Whom it concerns: who gives a student of trailing steps LCM's scheduler, or an LCM (trained on the grid of 50) DDIM's or
# Euler's; who trains on one grid and exports the other.
#
# What to do instead: `original_inference_steps` of the number of steps makes the grids equal, by scheduler_config.json
# alone; DMD2's page passes `timesteps=[999, 749, 499, 249]` at every call.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0

cat > "$tmp/finding.py" <<'PYTHON'
from importlib.metadata import version

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

for package in ("torch", "diffusers"):
    print(package, version(package))
ddim = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing")


def starts(kind, steps, **fields):
    scheduler = kind.from_config(ddim.config, **fields)
    assert scheduler.config.timestep_spacing == "trailing", kind
    scheduler.set_timesteps(steps)
    found = [round(float(t)) for t in scheduler.timesteps]
    print(f"{kind.__name__:32} {fields or ''} {steps} steps: {found}")
    return found


trailing = {1: [999], 2: [999, 499], 4: [999, 749, 499, 249], 8: [999, 874, 749, 624, 499, 374, 249, 124]}
kept = (DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler,
        UniPCMultistepScheduler)
for kind in kept:
    for steps, expected in trailing.items():
        assert starts(kind, steps) == expected, kind
for kind in (LCMScheduler, TCDScheduler):
    assert starts(kind, 1) == trailing[1] and starts(kind, 2) == trailing[2], kind
    assert starts(kind, 4) == [999, 759, 499, 259], kind
    assert starts(kind, 8) == [999, 879, 759, 639, 499, 379, 259, 139], kind
    for steps, expected in trailing.items():
        assert starts(kind, steps, original_inference_steps=steps) == expected, kind
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
