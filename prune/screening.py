"""A screen before the block scores: how far one evaluation of the network without a block is from the whole one's.

Every block is skipped at the same inputs: those of the whole network's own sampling, one of its steps for each prompt,
so that a block costs one evaluation a prompt and no image. Scores are then taken of the blocks that this leaves, those
that are cheapest per millisecond, up to a multiple of what the round has to save.

Axes: B rows of a batch, N kept blocks, P prompts, C channels, H and W latent size.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from slimstep.data.prompts import PromptSet
from slimstep.engine.parallel import map_batches
from slimstep.eval.sampling import Sampler
from slimstep.models.families.prunable import Prunable


@dataclass(frozen=True)
class Screen:
    """`errors`: {kept block: squared error of the prediction without it, in units of the prediction's mean square}.
    `latents_PCHW`: where the whole network's sampling ends, for the scores to begin with."""

    errors: Mapping[str, float]
    latents_PCHW: Tensor

    def cheapest(self, ms: Mapping[str, float], enough_ms: float) -> tuple[str, ...]:
        """The blocks whose removal costs least error a millisecond, in order of execution, until they save enough; two
        at least, for there is nothing to choose from one."""
        saving = [block for block in self.errors if ms[block] > 0]
        order = sorted(saving, key=lambda block: self.errors[block] / ms[block])
        saved_before = [0.0, *itertools.accumulate(ms[block] for block in order)]
        needed = {block for block, saved in zip(order, saved_before, strict=False) if saved < enough_ms}
        chosen = needed | set(order[:2])
        return tuple(block for block in self.errors if block in chosen)


@torch.inference_mode()
def screen_blocks(
    unet: Prunable, sampler: Sampler, prompts: PromptSet, batch_size: int, accelerator: Accelerator,
    keep: Path | None = None,
) -> Screen:  # fmt: skip
    """(steps of the sampling + 1 + blocks) evaluations for each prompt, with guidance in the former alone."""
    texts, blocks, shape = prompts.prompts, unet.kept_blocks, sampler.latent_shape

    def whole(indices: list[int]) -> Tensor:
        """[B, 3·C·H·W + 1]: an input, the prediction there, the end of the sampling; and the input's timestep."""
        cond = sampler.encode(texts).rows(indices)

        def draw(network: nn.Module, rows: list[int], _: Tensor | None) -> Tensor:
            inputs: list[tuple[Tensor, Tensor]] = []
            own, numbers = cond.rows(rows), [indices[row] for row in rows]
            end_BCHW = sampler.latents_at(network, own, numbers, inputs=inputs)
            steps = [number % len(inputs) for number in numbers]
            x_BCHW = torch.stack([inputs[step][0][b] for b, step in enumerate(steps)])
            t_B = torch.stack([inputs[step][1] for step in steps])
            columns = x_BCHW, sampler.predict(network, x_BCHW, t_B, own), end_BCHW, t_B[:, None]
            return torch.cat([column.flatten(1).float() for column in columns], dim=1)

        return sampler.in_parts(draw, unet, len(indices))

    def errors(items: list[int]) -> Tensor:
        columns, indices = zip(*(divmod(item, len(texts)) for item in items), strict=True)
        mask_BN = torch.ones(len(items), len(blocks), dtype=torch.bool)
        mask_BN[torch.arange(len(items)), list(columns)] = False
        cond, x_BCHW = sampler.encode(texts).rows(indices), inputs_PCHW[list(indices)]

        def draw(network: nn.Module, rows: list[int], block_mask_BN: Tensor | None) -> Tensor:
            t_B = times_P[[indices[row] for row in rows]]
            return sampler.predict(network, x_BCHW[rows], t_B, cond.rows(rows), block_mask_BN).float()

        found_BCHW = sampler.in_parts(draw, unet, len(items), mask_BN.to(unet.device)).cpu()
        predicted_BCHW = predicted_PCHW[list(indices)]
        return (found_BCHW - predicted_BCHW).square().flatten(1).mean(1) / predicted_BCHW.square().flatten(1).mean(1)

    shared = batch_size, accelerator
    table = map_batches(whole, len(texts), *shared, "the whole network's steps", keep and keep / "screen")
    inputs_PCHW, predicted_PCHW, ends_PCHW = (part.view(-1, *shape) for part in table[:, :-1].chunk(3, dim=1))
    times_P = table[:, -1]
    found = map_batches(errors, len(blocks) * len(texts), *shared, "a screen of the blocks", keep and keep / "screened")
    means = found.view(len(blocks), len(texts)).mean(1)
    return Screen(dict(zip(blocks, means.tolist(), strict=True)), ends_PCHW)
