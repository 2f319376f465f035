#!/usr/bin/env bash
# Library: torch 2.14.1, AOTInductor on a CPU.
#
# Wan's pipeline cuts the text states of every caption to the caption's own length, which its mask says, and fills them
# up with zeros again.
#
# A good guess: what torch.export takes, and torch.compile runs, AOTInductor compiles.
#
# What really happens: the export is right for captions of other lengths, and torch.compile gives the same numbers.
# AOTInductor writes C++ that does not compile: `None` stands where the length of the slice should.
#
# Whom it concerns: who packages the text encoder of such a pipeline with its way of filling up.
#
# What to do instead: multiply the states by their mask. These are the same numbers, and no length depends on the data.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR="$tmp/cache"

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy

cat > "$tmp/finding.py" <<'PYTHON'
import logging
import sys
from pathlib import Path

import torch
from torch import nn
from torch._inductor import aoti_compile_and_package

logging.disable(logging.WARNING)
print("torch", torch.__version__)


class Cut(nn.Module):
    def forward(self, states, mask):
        lengths = mask.gt(0).sum(dim=1).long()
        cut = [row[:length] for row, length in zip(states, lengths)]
        return torch.stack([torch.cat([row, row.new_zeros(8 - row.size(0), row.size(1))]) for row in cut])


class Multiplied(nn.Module):
    def forward(self, states, mask):
        return states * mask[..., None]


def masks(length):
    return (torch.arange(8) < length).long()[None]


def packaged(program):
    try:
        aoti_compile_and_package(program, package_path=str(Path(sys.argv[1]) / "graph.pt2"))
    except Exception as error:
        return next(line.strip() for line in str(error).splitlines() if "error:" in line).rpartition("error: ")[2]
    return "compiled"


states, said = torch.randn(1, 8, 4), {}
for kind in (Cut, Multiplied):
    program = torch.export.export(kind(), (states, masks(3)), strict=False)
    for length in (3, 5):
        expected = states * masks(length)[..., None]
        assert torch.equal(program.module()(states, masks(length)), expected)
        assert torch.equal(torch.compile(kind())(states, masks(length)), expected)
    said[kind.__name__] = packaged(program)
    print(f"{kind.__name__}: exported and compiled in the process to the same numbers; AOTInductor: {said[kind.__name__]}")
assert "None" in said["Cut"] and "not declared" in said["Cut"] and said["Multiplied"] == "compiled", said
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py" "$tmp"
