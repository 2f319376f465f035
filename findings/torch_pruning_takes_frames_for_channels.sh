#!/usr/bin/env bash
# Library: torch-pruning 1.6.1, torch 2.14.1.
#
# torch-pruning finds which channels of which layers go together by following autograd's graph. Networks of videos take
# frames out of the middle of a tensor, and double them: causal autoencoders (Wan's) treat the first frame by itself.
#
# A good guess: what is done along the time leaves channels as they are, so that where channels 2 and 5 of one
# convolution go, 2 and 5 of the next one's inputs go.
#
# What really happens: a slice of frames is taken for a slice of channels. With x[:, :, :1] beside conv(x[:, :, 1:]) the
# inputs 1 and 4 of conv are pruned in the place of 2 and 5, and the inputs of what follows not at all. Behind
# repeat_interleave of frames the next convolution is not in the group. No word is said; the pruned network has the
# wrong channels, or layers that do not fit. The same by index_select is right.
#
# Whom it concerns: who prunes channels of video networks by torch-pruning's dependency graph.
#
# What to do instead: let it follow a copy of the network that takes frames by index_select, doubles them by interpolate
# and joins them as sums with zeros, and check that the pruned network is the old one without those channels.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export OMP_NUM_THREADS=1

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 torch-pruning==1.6.1 numpy

cat > "$tmp/finding.py" <<'PYTHON'
from importlib.metadata import version

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

print("torch-pruning", version("torch-pruning"), "torch", torch.__version__)


class Network(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.first, self.second, self.last = way, nn.Conv3d(3, 8, 1), nn.Conv3d(8, 8, 1), nn.Conv3d(8, 3, 1)

    def forward(self, video):
        x, frames = self.first(video), video.shape[2]
        if self.way == "doubled":
            return self.last(self.second(x).repeat_interleave(2, dim=2))
        if self.way == "by slices":
            begin, rest = x[:, :, :1], x[:, :, 1:]
        else:
            begin, rest = (x.index_select(2, torch.arange(*ends)) for ends in ((0, 1), (1, frames)))
        begin = F.pad(begin, (0, 0, 0, 0, 0, frames - 1))
        return self.last(begin + F.pad(self.second(rest), (0, 0, 0, 0, 1, 0)))


def goes(way):
    """{layer: inputs that go} with channels 2 and 5 of the first convolution, where frames are doubled of the second."""
    network = Network(way)
    graph = tp.DependencyGraph().build_dependency(network, torch.randn(1, 3, 4, 5, 6), verbose=False)
    root = network.second if way == "doubled" else network.first
    group = graph.get_pruning_group(root, tp.prune_conv_out_channels, [2, 5])
    names = {layer: name for name, layer in network.named_modules()}
    return {names[item.dep.target.module]: sorted(item.idxs) for item in group
            if item.dep.handler == tp.prune_conv_in_channels and item.dep.target.module in names}


found = {way: goes(way) for way in ("by index", "by slices", "doubled")}
for way, inputs in found.items():
    print(f"frames {way}: inputs that go {inputs}")
assert found["by index"] == {"second": [2, 5], "last": [2, 5]}
assert found["by slices"] == {"second": [1, 4]}
assert found["doubled"] == {}
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
