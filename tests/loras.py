"""LoRAs as PEFT names them, drawn instead of trained: no release of a library has to add an adapter for a test.

Axes: O outputs of a module, I its inputs, R the rank, times a convolution's kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def draw_lora(
    network: nn.Module, targets: Sequence[str], rank: int = 2, seed: int = 0, dora: bool = False
) -> dict[str, Tensor]:
    """`PATH.lora_A.weight` [R, I] and `PATH.lora_B.weight` [O, R] for every module whose path ends in a target.

    dora: `PATH.lora_magnitude_vector` [O] as well, above 0.
    """
    draw, weights = torch.Generator().manual_seed(seed), {}
    for path, module in network.named_modules():
        if not f".{path}".endswith(tuple(f".{target}" for target in targets)):
            continue
        outputs, inputs, *kernel = module.weight.shape
        ones = [1] * len(kernel)
        weights[f"{path}.lora_A.weight"] = torch.randn(rank, inputs, *kernel, generator=draw)
        weights[f"{path}.lora_B.weight"] = torch.randn(outputs, rank, *ones, generator=draw)
        if dora:
            shape = (1, outputs, *ones) if kernel else (outputs,)
            weights[f"{path}.lora_magnitude_vector"] = torch.randn(shape, generator=draw).abs()
    return weights
