#!/usr/bin/env bash
# Library: diffusers 0.42.1, with torch 2.14.1.
#
# A pipeline asks FlowMatchEulerDiscreteScheduler for N steps of a flow from noise (σ = 1) to the image (σ = 0).
#
# A good guess: σ goes down in N steps of some size each; without a shift, four steps start at 1, 0.75, 0.5 and 0.25.
#
# What really happens: where the pipeline gives no σ of its own (Stable Diffusion 3, Sana, and others), the last of any
# number of steps starts at the last training time: 1, 0.667, 0.334 and 0.001. It removes no noise, and N steps are as
# exact as N − 1. With Stable Diffusion 3's shift two steps start at 1 and 0.0089: they are one. Qwen-Image's pipeline
# gives its own σ, and its `shift_terminal` of 0.02 stretches the last one to next to nothing again.
#
# Whom it concerns: who samples or distils such models at one to eight steps, and who compares them with FLUX.1, whose
# σ end at 1/N. At 28 steps one of them is lost.
#
# What to do instead: `shift_terminal` says where the last step starts. At the shifted 1/N all N steps remove noise, in
# any pipeline and by scheduler_config.json alone. It is of one number of steps; a single step with it is 0/0, and NaN.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0

cat > "$tmp/finding.py" <<'PYTHON'
import warnings
from importlib.metadata import version

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

warnings.filterwarnings("ignore", message="invalid value encountered")
for package in ("torch", "diffusers"):
    print(package, version(package))


def sigmas(steps, own=None, mu=None, **fields):
    scheduler = FlowMatchEulerDiscreteScheduler(**fields)
    scheduler.set_timesteps(steps, sigmas=own, **({} if mu is None else {"mu": mu}))
    return [round(value, 4) for value in scheduler.sigmas.tolist()[:-1]]


def shown(what, found, expected):
    print(f"{what}: σ = {found}")
    assert np.allclose(found, expected, atol=2e-3), (found, expected)


shown("no shift, 4 steps", sigmas(4), [1, 0.667, 0.334, 0.001])
shown("shift 3, 4 steps", sigmas(4, shift=3.0), [1, 0.8577, 0.6022, 0.0089])
shown("shift 3, 2 steps", sigmas(2, shift=3.0), [1, 0.0089])
own = np.linspace(1, 1 / 4, 4)
qwen = dict(use_dynamic_shifting=True, shift_terminal=0.02, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192)
shown("Qwen-Image's, 4 steps", sigmas(4, own, mu=0.69, **qwen)[-1:], [0.02])
shown("no shift, 4 steps, shift_terminal=1/4", sigmas(4, shift_terminal=1 / 4), [1, 0.75, 0.5, 0.25])
single = sigmas(1, shift_terminal=1 / 4)
print(f"no shift, 1 step, shift_terminal=1/4: σ = {single}")
assert np.isnan(single[0])

# Euler's error on a flow that is known: data N(2, 0.3²), so that u(x, σ) = E[ε − x0 | x] is linear in x.
MEAN, DEVIATION = 2.0, 0.3
noise = torch.linspace(-2, 2, 401)


def error(steps, **fields):
    """Root of the mean squared distance to where the flow ends, 2 + 0.3 ε."""
    scheduler = FlowMatchEulerDiscreteScheduler(**fields)
    scheduler.set_timesteps(steps)
    x = noise.clone()
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist()):
        variance = (1 - sigma) ** 2 * DEVIATION**2 + sigma**2
        apart = x - (1 - sigma) * MEAN
        x0 = MEAN + (1 - sigma) * DEVIATION**2 / variance * apart
        x = scheduler.step(sigma / variance * apart - x0, t, x, return_dict=False)[0]
    return (x - MEAN - DEVIATION * noise).square().mean().sqrt().item()


four, three, all_four = error(4), error(3, shift_terminal=1 / 3), error(4, shift_terminal=1 / 4)
print(f"error of 4 steps: {four:.4f}; of 3 that all remove noise: {three:.4f}; of 4 that all do: {all_four:.4f}")
assert abs(four / three - 1) < 0.02 and all_four < 0.9 * four, (four, three, all_four)
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
