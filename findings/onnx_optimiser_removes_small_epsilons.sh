#!/usr/bin/env bash
# Library: onnxscript 0.7.2 with onnx-ir 1.1.0, which torch 2.14.1's torch.onnx.export runs by default (optimize=True).
#
# Networks add a small number to what they divide by: Sana's linear attention, in its transformer and in its autoencoder
# (diffusers), divides by x + 1e-15, and others' pixel norms by sqrt(x + 1e-8).
#
# A good guess: the optimiser leaves out additions of zero, and the graph computes what the network does, up to rounding.
#
# What really happens: an addition or subtraction of a constant up to 1e-8 counts as one of zero and is left out (numpy's
# isclose, whose absolute tolerance is 1e-8), so that 0 / (0 + 1e-15) becomes 0 / 0. Of 1.1e-8 it stays. There is no
# message; the file loads, and where a head has no activation above zero the output is nan: with a small AutoencoderDC
# (heads of four channels, random weights) most of the image. torch.export's own graph, and the ONNX file with
# optimize=False, are right.
#
# Whom it concerns: who exports Sana, or any network with such an epsilon, to ONNX by torch's exporter.
#
# What to do instead: optimize=False (onnxruntime optimises by itself when it loads a file), and compare the file with the
# network on inputs that reach zeros.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 onnxruntime==1.32.0 diffusers==0.42.1 \
    transformers==5.24.0 accelerate==1.15.0

cat > "$tmp/finding.py" <<'PYTHON'
from importlib.metadata import version

import numpy as np
import onnxruntime
import torch
from diffusers import AutoencoderDC

print(*(f"{name} {version(name)}" for name in ("torch", "onnxscript", "onnx-ir", "onnxruntime", "diffusers")), sep=", ")


class Ratio(torch.nn.Module):
    def __init__(self, epsilon):
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x):
        return x / (x + self.epsilon)


class Decoder(torch.nn.Module):
    def __init__(self, autoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, z):
        return self.autoencoder.decode(z, return_dict=False)[0]


def by_onnx(module, x, file, **options):
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False, **options)
    program.save(file)
    session = onnxruntime.InferenceSession(file)
    kinds = [node.op_type for node in program.model.graph if node.op_type != "Constant"]
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], kinds


def main(folder):
    zero = torch.zeros(1)
    for epsilon, stays in ((1e-15, False), (1e-8, False), (1.1e-8, True), (1e-6, True)):
        right, _ = by_onnx(Ratio(epsilon), zero, f"{folder}/plain.onnx", optimize=False)
        found, kinds = by_onnx(Ratio(epsilon), zero, f"{folder}/optimised.onnx")
        print(f"0 / (0 + {epsilon:g}): {right[0]:g} without the optimiser, {found[0]:g} with it, from {kinds}")
        assert right[0] == 0 and np.isnan(found[0]) != stays and ("Add" in kinds) == stays

    torch.manual_seed(0)
    sizes = {"latent_channels": 4, "attention_head_dim": 4}
    sizes |= {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    sizes |= {f"{part}_block_types": ("ResBlock", "EfficientViTBlock") for part in ("encoder", "decoder")}
    sizes |= {f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")}
    sizes |= {f"{part}_qkv_multiscales": ((), ()) for part in ("encoder", "decoder")}
    decoder, z = Decoder(AutoencoderDC(**sizes).eval()), torch.randn(1, 4, 8, 8)
    expected = decoder(z).detach().numpy()
    right, _ = by_onnx(decoder, z, f"{folder}/plain.onnx", optimize=False)
    found, _ = by_onnx(decoder, z, f"{folder}/optimised.onnx")
    worst, share = np.abs(right - expected).max(), np.isnan(found).mean()
    print(f"AutoencoderDC: {worst:.1g} from torch without the optimiser, {share:.0%} of the pixels nan with it")
    assert worst < 1e-4 and share > 0


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py" "$tmp" 2>/dev/null
