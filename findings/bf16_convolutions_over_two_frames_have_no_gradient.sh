#!/usr/bin/env bash
# Library: torch 2.14.1, on a CPU with AVX-512 and bfloat16 (oneDNN's kernels).
#
# Layers over time of video networks are 3-D convolutions of kernel (3, 1, 1), padded by one frame at each end: Stable
# Video Diffusion has them in its UNet and in its decoder. They are trained in bfloat16 by autocast.
#
# A good guess: a gradient in bfloat16 is that in float32 to about three digits, whatever number of frames there is.
#
# What really happens: for exactly two frames the gradient of the weights is garbage: NaN, or numbers of 1e11 and more, not
# the same from call to call. For one, three, four and eight frames it is right, and so are the outputs, the gradient of
# the inputs, and float32. No word is said; a training ends in a loss that is not finite, or is ruined.
#
# Whom it concerns: who trains a video network, or a decoder that sees two frames at once, in bfloat16 on a CPU.
#
# What to do instead: float32 on a CPU, or another number of frames.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy

cat > "$tmp/finding.py" <<'PYTHON'
import torch

print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
torch.manual_seed(0)
conv = torch.nn.Conv3d(32, 32, (3, 1, 1), padding=(1, 0, 0))


def gradients(x, along, dtype):
    x = x.clone().requires_grad_()
    conv.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = conv(x)
    (y.float() * along).sum().backward()
    return y.detach().float(), x.grad, conv.weight.grad.clone()


def error(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


wrong = {}
for frames in (1, 2, 3, 4, 8):
    x, along = torch.randn(2, 32, frames, 16, 16), torch.randn(2, 32, frames, 16, 16)
    exact = gradients(x, along, torch.float32)
    found = gradients(x, along, torch.bfloat16)
    output, of_inputs, of_weights = (error(one, other) for one, other in zip(found, exact, strict=True))
    wrong[frames] = not of_weights < 0.02
    print(f"{frames} frames: errors in bfloat16: output {output:.1e}, gradient of inputs {of_inputs:.1e}, of weights "
          f"{of_weights:.1e}")
    assert output < 0.02 and of_inputs < 0.02

assert wrong == {1: False, 2: True, 3: False, 4: False, 8: False}, wrong
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
