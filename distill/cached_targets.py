"""Cached teacher targets: images with fixed noises and steps, and the teacher's target of each, computed once.

Axes: B batch, C channels, H and W latent size.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from slimstep.engine.loop import Samples
from slimstep.engine.objective import Batch, CachedTargets
from slimstep.engine.parallel import map_batches
from slimstep.engine.run import Run
from slimstep.engine.seeding import generator
from slimstep.models.conditioning import Conditioning

FILE = "answers.safetensors"


class TargetInputs(Dataset):
    """Every pair `cached.per_image` times; sample j is pair j mod P with a noise, a step and a caption, functions of j.

    An item is the pair's, with "noise" [C, H, W] and "step", and without a caption in a share of the samples.
    """

    def __init__(self, pairs: Samples, cached: CachedTargets, uncond: Conditioning, seed: int):
        self.pairs, self.cached, self.seed = pairs, cached, seed
        self.uncond = uncond.map(lambda tensor: tensor[0]).tensors

    def __len__(self) -> int:
        return self.cached.per_image * len(self.pairs)

    def __getitem__(self, j: int) -> dict:
        pair, draw = self.pairs[j % len(self.pairs)], generator("fixed draws", self.seed, j)
        noise = torch.randn(pair["latents"].shape, generator=draw)
        step = torch.randint(self.cached.num_steps, (), generator=draw)
        dropped = torch.rand((), generator=draw) < self.cached.caption_dropout
        return {**pair, "noise": noise, "step": step, **(self.uncond if dropped else {})}


class CachedTargetPairs(Dataset):
    """Fixed draws with their teacher targets: "target" [C, H, W], which is x̃, and "gap", the error of a single step."""

    def __init__(self, draws: TargetInputs, targets: dict[str, Tensor]):
        self.draws, self.targets = draws, targets

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, j: int) -> dict:
        return {**self.draws[j], **{name: values[j] for name, values in self.targets.items()}}


def with_targets(
    draws: TargetInputs,
    compute: Callable[[Batch], tuple[Tensor, Tensor]],
    run: Run,
    stage: str,
    batch_size: int,
    keep: Path,
) -> CachedTargetPairs:
    """The draws with their teacher targets, from `stage`/answers.safetensors or computed now, shared among processes.

    `compute(batch)` gives (target [B, C, H, W], gap [B]). Finished batches lie under `keep` until all are there.
    """

    def compute_rows(indices: list[int]) -> Tensor:
        batch = torch.utils.data.default_collate([draws[j] for j in indices])
        moved = {key: v.to(run.accelerator.device) for key, v in batch.items() if torch.is_tensor(v)}
        target_BCHW, gap_B = compute(moved)
        return torch.cat([target_BCHW.flatten(1), gap_B[:, None]], dim=1)

    def targets() -> dict[str, Tensor]:
        shape, desc = draws[0]["latents"].shape, f"{stage}: teacher targets"
        values = map_batches(compute_rows, len(draws), batch_size, run.accelerator, desc, keep)
        return {"target": values[:, :-1].unflatten(1, shape), "gap": values[:, -1]}

    return CachedTargetPairs(draws, run.tensors(f"{stage}/{FILE}", targets))
