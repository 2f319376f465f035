"""Linear maps fitted to what a block gives, full matrices over its channels, and put in its place.

Axes: R positions, C channels.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from slimstep.models.families.prunable import Prunable

RIDGE = 1e-3  # of the channels' mean variance: where inputs are few the map falls back to the skip rule's output


class LeastSquares:
    """y ≈ z + (z − mean z)·D + mean (y − z), with ridge on D: the map from z to y, sums over positions in float64."""

    def __init__(self) -> None:
        self.positions, self.sums = 0, None

    def add(self, z: Tensor, y: Tensor) -> None:
        """Outputs of a block whose channels lie in the second of four axes, or in the last."""
        z_RC, d_RC = (by_position(x).double() for x in (z, y - z))
        self.positions += len(z_RC)
        new = z_RC.sum(0), d_RC.sum(0), z_RC.T @ z_RC, z_RC.T @ d_RC
        self.sums = new if self.sums is None else tuple(a + b for a, b in zip(self.sums, new, strict=True))

    @cached_property
    def solution(self) -> tuple[Tensor, Tensor, Tensor]:
        """mean z [C], mean (y − z) [C], D [C, C]."""
        z_C, d_C, zz_CC, zd_CC = (total / self.positions for total in self.sums)
        variance_CC = zz_CC - torch.outer(z_C, z_C)
        ridge = (RIDGE * variance_CC.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny)
        eye_CC = torch.eye(len(z_C), dtype=z_C.dtype, device=z_C.device)
        return z_C, d_C, torch.linalg.solve(variance_CC + ridge * eye_CC, zd_CC - torch.outer(z_C, d_C))

    def __call__(self, z: Tensor) -> Tensor:
        z_C, d_C, d_CC = (x.to(z.dtype) for x in self.solution)
        channels_last = z.movedim(1, -1) if z.ndim == 4 else z
        y = channels_last + (channels_last - z_C) @ d_CC + d_C
        return y.movedim(-1, 1) if z.ndim == 4 else y


def by_position(x: Tensor) -> Tensor:
    return (x.movedim(1, -1) if x.ndim == 4 else x).reshape(-1, x.shape[1 if x.ndim == 4 else -1])


@contextmanager
def replacing(unet: Prunable, block: str, replace: Callable[[str, int, Tensor], Tensor]) -> Iterator[None]:
    """While this runs every stream that a block gives, by the path of its instance and by number, is what `replace`
    makes of it. Some give nothing of the text."""

    def hook(path: str) -> Callable[[nn.Module, Any, Any], Any]:
        def replaced(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not isinstance(output, tuple):
                return replace(path, 0, output)
            return tuple(x if x is None else replace(path, k, x) for k, x in enumerate(output))

        return replaced

    with ExitStack() as stack:
        for path in unet.instances(block):
            stack.enter_context(unet.get_submodule(path).register_forward_hook(hook(path)))
        yield
