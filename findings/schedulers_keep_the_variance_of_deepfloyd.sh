#!/usr/bin/env bash
# Library: diffusers 0.42.1, with torch 2.14.1.
#
# DeepFloyd IF's UNets predict a variance beside the noise, six channels for three, which DDPMScheduler reads
# (`variance_type=learned_range`). The scheduler of a pipeline is swapped as diffusers says, by
# `OTHER.from_config(pipeline.scheduler.config)`.
#
# A good guess: any scheduler of the same noise schedule samples an IFPipeline, for the pipeline takes the variance off
# where its scheduler has none; at the least `variance_type=None` beside the configuration makes it do so.
#
# What really happens: DDIM's, Euler's and UniPC's schedulers have no `variance_type`, and keep what the configuration
# says of it, given `variance_type=None` or not. The pipeline reads it there, hands all six channels to the step, and
# sampling ends in a RuntimeError about tensors of 3 and 6 channels; without the key it ends in an AttributeError, for
# the pipeline reads it all the same. DPMSolverMultistepScheduler has the option, and works.
#
# Whom it concerns: who samples, or distils, IF in fewer steps than DDPM takes.
#
# What to do instead: `scheduler.register_to_config(variance_type=None)` after from_config.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0 ftfy==6.3.1

cat > "$tmp/finding.py" <<'PYTHON'
from importlib.metadata import version

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    IFPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

for package in ("torch", "diffusers"):
    print(package, version(package))

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=16, in_channels=3, out_channels=6, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
    attention_head_dim=4, cross_attention_dim=16,
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
)
own = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
pipeline = IFPipeline(None, None, unet, own, None, None, None, requires_safety_checker=False)
pipeline.set_progress_bar_config(disable=True)
text = torch.randn(1, 4, 16)


def outcome(scheduler) -> str:
    pipeline.scheduler = scheduler
    try:
        pipeline(prompt_embeds=text, negative_prompt_embeds=text, num_inference_steps=2, output_type="pt")
    except (RuntimeError, AttributeError) as error:
        return str(error).partition(" at ")[0]
    return "an image"


without = {key: value for key, value in own.config.items() if key != "variance_type"}
kinds = (DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler, DPMSolverMultistepScheduler)
found = {}
for kind in kinds:
    registered = kind.from_config(own.config)
    registered.register_to_config(variance_type=None)
    ways = {
        "its configuration": kind.from_config(own.config),
        "variance_type=None": kind.from_config(own.config, variance_type=None),
        "without the key": kind.from_config(without),
        "registered afterwards": registered,
    }
    found[kind.__name__] = [outcome(scheduler) for scheduler in ways.values()]
    for way, said in zip(ways, found[kind.__name__]):
        print(f"{kind.__name__}, {way}: {said}")

failed = "The size of tensor a (3) must match the size of tensor b (6)"
absent = "'FrozenDict' object has no attribute 'variance_type'"
for kind in kinds[:3]:
    assert found[kind.__name__] == [failed, failed, absent, "an image"], found
assert found["DPMSolverMultistepScheduler"] == ["an image"] * 4, found
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
