"""How far two sets of features are apart as distributions: Fréchet and kernel distance; density and coverage.

FID and KID are these of Inception features; of another network's they are other numbers.

Axes: N and M images, D features, S images of a subset.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slimstep.eval.metrics.compare import Mean, mean_and_error

SUBSETS, NEIGHBOURS = 100, 5


def frechet_distance(a_ND: Tensor, b_MD: Tensor) -> float:
    """Fréchet distance of the Gaussians with the sets' means and covariances (Heusel et al. 2017), in float64.

    With few images it is biased upwards: compare sets of the same size.
    The covariances are AᵀA and BᵀB of the centred features, and tr √(AᵀA BᵀB) is the sum of ABᵀ's singular values
    (Mathiasen and Hvilshøj 2020, arXiv 2009.14075): no root of a singular matrix is taken, so none can go astray.
    """
    a, b = (x.double().cpu().numpy() for x in (a_ND, b_MD))
    mean = a.mean(0) - b.mean(0)
    root_a, root_b = covariance_root(a), covariance_root(b)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return float(mean @ mean + np.square(root_a).sum() + np.square(root_b).sum() - 2 * cross)


def covariance_root(x_ND: np.ndarray) -> np.ndarray:
    """A matrix R of D columns, and no more rows than it needs, with RᵀR the covariance."""
    centred = (x_ND - x_ND.mean(0)) / (len(x_ND) - 1) ** 0.5
    return centred if len(centred) <= centred.shape[1] else np.asarray(np.linalg.qr(centred, mode="r"))


def kernel_distance(a_ND: Tensor, b_MD: Tensor, divisor: float = 1.0, size: int = 100) -> Mean:
    """Unbiased squared MMD with the kernel (x·y / divisor + 1)³ (Bińkowski et al. 2018), over random subsets.

    The published KID has divisor D, for features of norm √D; 1 is for unit features. The error is that of one subset's
    value: subsets share images. The expected value does not depend on the subsets' size.
    """
    draw, size = np.random.default_rng(0), min(size, len(a_ND), len(b_MD))
    scale = divisor**-0.5
    a, b, values = a_ND.double() * scale, b_MD.double() * scale, []
    for _ in range(SUBSETS):
        x, y = a[draw.choice(len(a), size, replace=False)], b[draw.choice(len(b), size, replace=False)]
        values.append(mmd(x, y).item())
    mean = mean_and_error(values)
    return Mean(mean.mean, float(np.std(values, ddof=1)), mean.n)


def mmd(x_SD: Tensor, y_SD: Tensor) -> Tensor:
    """The unbiased estimate of the squared maximum mean discrepancy for the kernel (x·y + 1)³."""
    size = len(x_SD)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T + 1) ** 3

    def without_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (size * (size - 1))

    return without_diagonal(kernel(x_SD, x_SD)) + without_diagonal(kernel(y_SD, y_SD)) - 2 * kernel(x_SD, y_SD).mean()


@dataclass(frozen=True)
class Coverage:
    """`coverage`: the share of real images with a made one in their neighbourhood; `expected`, what it would be on
    average of as many made images of the real ones' own distribution. `density`: in how many neighbourhoods a made
    image lies, in units of `k`; about 1 for the real distribution, more for images at its middle, and unbounded."""

    coverage: float
    expected: float
    density: float
    k: int


def coverage(made_ND: Tensor, real_MD: Tensor, k: int = NEIGHBOURS) -> Coverage:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797), in float64: the neighbourhood of a real image
    reaches as far as its k-th nearest real one; to the farthest, where there are fewer."""
    made, real = made_ND.double(), real_MD.double()
    k = min(k, len(real) - 1)
    reach_M = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # the nearest is itself
    is_near_MN = torch.cdist(real, made) <= reach_M[:, None]
    density = is_near_MN.sum().item() / (k * len(made))
    return Coverage(is_near_MN.any(1).double().mean().item(), expected_coverage(len(made), len(real), k), density, k)


def expected_coverage(n: int, m: int, k: int) -> float:
    """Of n made and m real images of one distribution: none of the k nearest among all others is made with the
    probability Π (m − i) / (n + m − i), i = 1 … k (Naeem et al., too)."""
    i = np.arange(1, k + 1)
    return float(1 - np.prod((m - i) / (n + m - i)))
