"""How alike a block's input and output are while images are drawn: what changes little is taken to matter little.

By such rules SANA-1.5 (Xie et al. 2025, arXiv 2501.18427) and FLUX.1-lite cut their transformers. One sampling of the
calibration prompts ranks all blocks, and no image is scored.

Axes: B rows of a batch, N kept blocks.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from slimstep.data.prompts import PromptSet
from slimstep.engine.parallel import map_batches
from slimstep.eval.sampling import Sampler
from slimstep.models.families.prunable import Prunable

STREAM = "hidden_states"  # of several that a block gives on, that of the image


def block_similarities(
    unet: Prunable, sampler: Sampler, prompts: PromptSet, batch_size: int, accelerator: Accelerator,
    keep: Path | None = None,
) -> dict[str, float | None]:  # fmt: skip
    """{kept block: cosine of its input and output, mean over prompts and steps}; None where their shapes differ."""
    unet = unet.eval()

    def measured(indices: list[int]) -> Tensor:
        cond = sampler.conditions(prompts.prompts, indices)
        with watched(unet) as seen:
            sampler.latents_at(unet, cond, indices)
        columns = [torch.stack(seen[block]).mean(0) for block in unet.kept_blocks]
        return torch.stack(columns, 1).view(-1, len(indices), len(columns)).mean(0)  # guidance: both rows of a prompt

    means_N = map_batches(measured, len(prompts), batch_size, accelerator, "similarities", keep).mean(0)
    found = zip(unet.kept_blocks, means_N.tolist(), strict=True)
    return {block: None if math.isnan(value) else value for block, value in found}


@contextmanager
def watched(unet: Prunable) -> Iterator[dict[str, list[Tensor]]]:
    """{kept block: the cosines [B] of its input and output, for every time that it runs}, while the block is open."""
    seen: dict[str, list[Tensor]] = {block: [] for block in unet.kept_blocks}

    def watch(block: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            before = kwargs[STREAM] if STREAM in kwargs else args[0]
            after = output
            if isinstance(output, tuple):
                after = output[module.STREAMS.index(STREAM) if hasattr(module, "STREAMS") else 0]
            seen[block].append(cosine(before, after))

        return unet.get_submodule(block).register_forward_hook(hook, with_kwargs=True)

    handles = [watch(block) for block in seen]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def cosine(before: Tensor, after: Tensor) -> Tensor:
    """[B], in float32 on the CPU; nan where the shapes differ."""
    if before.shape != after.shape:
        return torch.full((len(before),), torch.nan)
    return F.cosine_similarity(before.flatten(1).float(), after.flatten(1).float()).cpu()
