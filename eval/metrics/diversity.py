"""How different the images are that a model draws for one prompt: a few-step student may draw the same one every time.

Axes: P prompts, K images of a prompt, D features.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from slimstep.data.prompts import PromptSet
from slimstep.engine.seeding import seed_of


def mean_pairwise_distance(features_PKD: Tensor) -> Tensor:
    """1 − cosine, the mean over all pairs of a prompt's K images, float64 [P]: 0 for equal images, 1 for orthogonal.

    Its expectation does not depend on K. The cosines of all pairs are (‖Σf‖² − K) / 2 for unit features f.
    """
    unit_PKD = normalize(features_PKD.double(), dim=-1)
    count = unit_PKD.shape[1]
    return 1 - (unit_PKD.sum(1).square().sum(1) - count) / (count * (count - 1))


def further_seeds(seed: int, count: int) -> list[int]:
    """Seeds of the 2nd, 3rd … of `count` images of a prompt; the first is the evaluation's own, of `seed`."""
    return [seed_of("diversity", seed, k) for k in range(1, count)]


def first_of_texts(prompts: PromptSet, count: int) -> list[int]:
    """The indices of the first `count` distinct prompts, each where it stands first."""
    return [prompts.prompts.index(text) for text in prompts.distinct[:count]]


def runs_of(items: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """Of numbers k·size + j: every k in order, with its j."""
    for k in sorted({item // size for item in items}):
        yield k, [item % size for item in items if item // size == k]


def stacked(first_PD: Tensor, further_JD: Tensor) -> Tensor:
    """[P, K, D] of a prompt's first features, and of further ones seed by seed."""
    return torch.cat([first_PD[None], further_JD.unflatten(0, (-1, len(first_PD)))]).transpose(0, 1)
