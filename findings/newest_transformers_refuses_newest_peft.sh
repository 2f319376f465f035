#!/usr/bin/env bash
# Library: transformers 5.24.0 and peft 0.21.2, the newest releases of both on 2026-11-28, with diffusers 0.42.1.
#
# A good guess: the newest releases fit each other, since pip installs them together and `pip check` is content.
#
# What really happens: `text_encoder.add_adapter(LoraConfig(...))` raises ValueError and asks for peft 0.22.0, which
# had not been published. transformers does not declare peft, so pip cannot know. `disable_adapters`,
# `enable_adapters` and `active_adapters` of the text encoder raise as well. `load_adapter` has no such check, so
# reading a LoRA works and training one does not. diffusers' `unet.add_adapter` works.
#
# Whom it concerns: everybody who trains a LoRA on a text encoder of a diffusion pipeline. The example scripts of
# diffusers call `text_encoder.add_adapter`.
#
# What to do instead: call peft itself: `inject_adapter_in_model(config, text_encoder)`, and
# `layer.enable_adapters(...)` on its layers to switch them.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 diffusers==0.42.1 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
"$tmp/venv/bin/pip" check --disable-pip-version-check

cat > "$tmp/finding.py" <<'PYTHON'
from importlib.metadata import requires, version

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import CLIPTextConfig, CLIPTextModel

for package in ("torch", "diffusers", "transformers", "peft"):
    print(package, version(package))
assert not any(line.startswith("peft") for line in requires("transformers"))


def text_encoder():
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )
    return CLIPTextModel(config).eval()


@torch.no_grad()
def output(model):
    return model(torch.arange(3, 10)[None]).last_hidden_state


def refused(what, call):
    try:
        call()
    except ValueError as error:
        print(f"{what}: ValueError: {error}")
        assert "PEFT" in str(error) and "0.22.0" in str(error), error
    else:
        raise AssertionError(f"{what} is no longer refused")


def lora(*targets):
    return LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)


refused("add_adapter", lambda: text_encoder().add_adapter(lora("q_proj")))

model = text_encoder()
bare = output(model)
inject_adapter_in_model(lora("q_proj"), model)
trained = output(model)
assert (trained - bare).abs().max() > 0.01

reader = text_encoder()
reader.load_adapter(peft_config=lora("q_proj"), adapter_state_dict=get_peft_model_state_dict(model))
off = (output(reader) - trained).abs().max().item()
print(f"load_adapter reads what peft itself trained; the output is off by {off:.2g}.")
assert off < 1e-4
for name in ("disable_adapters", "enable_adapters", "active_adapters"):
    refused(name, getattr(reader, name))

for layer in model.modules():
    if isinstance(layer, BaseTunerLayer):
        layer.enable_adapters(False)
assert torch.equal(output(model), bare)
print("inject_adapter_in_model adds the same LoRA, and layer.enable_adapters(False) switches it off.")

unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=32, attention_head_dim=4,
)
unet.add_adapter(lora("to_q"))
unet.disable_adapters()
print("diffusers' unet.add_adapter and unet.disable_adapters work.")
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
