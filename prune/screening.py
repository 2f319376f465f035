"""A screen before the block scores: how far one evaluation of the network without a block is from the whole one's.

Every block is skipped, and changed in the other ways of changes.py, at the same inputs: those of the whole network's
own sampling, one of its steps for each prompt, so that a change costs one evaluation a prompt and no image. Scores are
then taken of the changes that this leaves, those that are cheapest per millisecond, up to a multiple of what the round
has to save.

Axes: B rows of a batch, N kept blocks, P prompts, C channels, H and W latent size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from slimstep.data.prompts import PromptSet
from slimstep.engine.parallel import map_batches
from slimstep.eval.sampling import Sampler
from slimstep.models.families.prunable import Prunable
from slimstep.prune.changed import Labels, changed
from slimstep.prune.changes import Change


@dataclass(frozen=True)
class Screen:
    """`errors`: {label of a change: squared error of the prediction after it, in units of the prediction's mean
    square}. `latents_PCHW`: where the whole network's sampling ends, for the scores to begin with."""

    errors: Mapping[Labels, float]
    latents_PCHW: Tensor

    def cheapest(self, ms: Mapping[str, float], enough_ms: float) -> tuple[str, ...]:
        """The changes that cost least error a millisecond, in the screen's order, until they save enough; two at least,
        for there is nothing to choose from one. Of changes of one part, or of a whole block, the one that saves most is
        counted."""
        saving = [label for label in self.errors if ms[label] > 0]
        order = sorted(saving, key=lambda label: self.errors[label] / ms[label])
        saved: dict[tuple[str, str | None], float] = {}
        chosen: set[str] = set()
        for label in order:
            if len(chosen) >= 2 and total_ms(saved) >= enough_ms:
                break
            chosen.add(label)
            change = Change.of(label)
            place = change.block, change.place
            saved[place] = max(saved.get(place, 0.0), ms[label])
        return tuple(label for label in self.errors if label in chosen)


def total_ms(saved: Mapping[tuple[str, str | None], float]) -> float:
    """What changes save together: of a block its removal, or its other dtype, or those of its parts."""
    parts = {block: 0.0 for block, _ in saved}
    for (block, part), ms in saved.items():
        parts[block] += ms if part else 0.0
    return sum(max(ms, saved.get((block, None), 0.0)) for block, ms in parts.items())


@torch.inference_mode()
def screen_blocks(
    unet: Prunable, sampler: Sampler, prompts: PromptSet, batch_size: int, accelerator: Accelerator,
    keep: Path | None = None, changes: Sequence[Labels] | None = None,
) -> Screen:  # fmt: skip
    """(steps of the sampling + 1 + changes) evaluations for each prompt, with guidance in the former alone. changes:
    their labels, one or several at once, by default the removals of all kept blocks."""
    texts, shape = prompts.prompts, sampler.latent_shape
    changes = tuple(unet.kept_blocks if changes is None else changes)

    def whole(indices: list[int]) -> Tensor:
        """[B, 3·C·H·W + 1]: an input, the prediction there, the end of the sampling; and the input's timestep."""
        cond = sampler.conditions(texts, indices)

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

        def predictions(rows: list[int], block_mask_BN: Tensor | None) -> Tensor:
            own = [indices[row] for row in rows]
            cond, x_BCHW = sampler.conditions(texts, own), inputs_PCHW[own]

            def draw(network: nn.Module, part: list[int], mask_BN: Tensor | None) -> Tensor:
                t_B = times_P[[own[row] for row in part]]
                return sampler.predict(network, x_BCHW[part], t_B, cond.rows(part), mask_BN).float()

            return sampler.in_parts(draw, unet, len(rows), block_mask_BN).cpu()

        found_BCHW = changed(unet, [changes[column] for column in columns], predictions)
        predicted_BCHW = predicted_PCHW[list(indices)]
        return (found_BCHW - predicted_BCHW).square().flatten(1).mean(1) / predicted_BCHW.square().flatten(1).mean(1)

    shared = batch_size, accelerator
    table = map_batches(whole, len(texts), *shared, "the whole network's steps", keep and keep / "screen")
    inputs_PCHW, predicted_PCHW, ends_PCHW = (part.view(-1, *shape) for part in table[:, :-1].chunk(3, dim=1))
    times_P = table[:, -1]
    items = len(changes) * len(texts)
    found = map_batches(errors, items, *shared, "a screen of the blocks", keep and keep / "screened")
    means = found.view(len(changes), len(texts)).mean(1)
    return Screen(dict(zip(changes, means.tolist(), strict=True)), ends_PCHW)
