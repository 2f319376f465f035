#!/usr/bin/env bash
# Library: coremltools 9.0 (the newest), with torch 2.14.1.
#
# A network is converted for any number of rows from 1 to 4: torch.export with a Dim, or torch.jit.trace with a
# coremltools.RangeDim.
#
# A good guess: a group norm, whose statistics belong to one row alone, takes a free number of rows as a convolution
# does; where something is refused it would be a free height or width, which its statistics run over.
#
# What really happens: the reverse. A free height is converted, and a free batch is "ValueError: Cannot add const [is0, …]
# Python native vals (list, tuple), np.array that are operation inputs cannot have symbolic values", for both ways of
# export, with no word of which dimension it means. The converter (_group_norm_impl in converters/mil/frontend/torch/
# ops.py) takes its path for constant shapes unless one of x.shape[2:] is free, and puts the free batch into a constant.
#
# Whom it concerns: who converts diffusion UNets and VAEs to Core ML for guided and unguided calls, or for several images.
#
# What to do instead: convert for one number of rows, or spell the norm out (reshape, mean, rsqrt), which is converted with
# a free batch.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 coremltools==9.0

cat > "$tmp/finding.py" <<'PYTHON'
from importlib.metadata import version

import coremltools
import torch
from torch import nn
from torch.export import Dim

print(*(f"{name} {version(name)}" for name in ("torch", "coremltools")), sep=", ")


class SpeltOut(nn.Module):
    """GroupNorm(2, 4) before its weights."""

    def forward(self, x):
        y = x.reshape(x.shape[0], 2, -1)
        y = y - y.mean(-1, keepdim=True)
        return (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-5)).reshape(x.shape)


def converted(network, free=(), trace=False):
    """What became of the conversion with these dimensions of x [2, 4, 8, 8] free."""
    x = torch.randn(2, 4, 8, 8)
    shape = [coremltools.RangeDim(1, 16, default=size) if n in free else size for n, size in enumerate(x.shape)]
    if trace:
        source = torch.jit.trace(network, x)
    else:
        dims = {n: Dim(f"d{n}", min=1, max=16) for n in free}
        source = torch.export.export(network, (x,), dynamic_shapes=(dims,)).run_decompositions({})
    try:
        coremltools.convert(
            source, convert_to="mlprogram", skip_model_load=True, inputs=[coremltools.TensorType(name="x", shape=shape)],
            minimum_deployment_target=coremltools.target.iOS17,
        )
    except ValueError as error:
        return str(error).splitlines()[0]
    return "converted"


conv = nn.Conv2d(4, 4, 3, padding=1)
norm = nn.Sequential(conv, nn.GroupNorm(2, 4)).eval()
found = {
    "a convolution, free batch": converted(conv, [0]),
    "group norm, nothing free": converted(norm),
    "group norm, free height": converted(norm, [2]),
    "group norm, free batch": converted(norm, [0]),
    "group norm, free batch, torch.jit.trace": converted(norm, [0], trace=True),
    "the norm spelt out, free batch": converted(nn.Sequential(conv, SpeltOut()), [0]),
}
for case, result in found.items():
    print(f"{case}: {result}")
fails = {case for case, result in found.items() if result.startswith("Cannot add const [is")}
assert fails == {"group norm, free batch", "group norm, free batch, torch.jit.trace"}
assert all(result == "converted" for case, result in found.items() if case not in fails)
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py" 2>/dev/null
