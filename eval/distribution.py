"""How far two sets of features are apart as distributions: Fréchet and kernel distance.

Axes: N and M images, D features.
"""

import numpy as np
import scipy.linalg
from torch import Tensor

from eval.compare import Mean, mean_and_error


def frechet_distance(a_ND: Tensor, b_MD: Tensor) -> float:
    """Fréchet distance of the Gaussians with the sets' means and covariances (Heusel et al. 2017), in float64.

    With few images it is biased upwards: compare sets of the same size.
    """
    a, b = (x.double().numpy() for x in (a_ND, b_MD))
    mean = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(np.real(root)))


def kernel_distance(a_ND: Tensor, b_MD: Tensor, subsets: int = 100, size: int = 100, seed: int = 0) -> Mean:
    """Unbiased squared MMD of unit features with the kernel (x·y + 1)³ (Bińkowski et al. 2018), over random subsets.

    Their kernel divides x·y by D, for features of norm √D. The error is that of one subset's value: subsets share
    images.
    """
    draw, size = np.random.default_rng(seed), min(size, len(a_ND), len(b_MD))
    a, b, values = a_ND.double(), b_MD.double(), []
    for _ in range(subsets):
        x, y = a[draw.choice(len(a), size, replace=False)], b[draw.choice(len(b), size, replace=False)]
        values.append(mmd(x, y).item())
    mean = mean_and_error(values)
    return Mean(mean.mean, float(np.std(values, ddof=1)), mean.n)


def mmd(x_SD: Tensor, y_SD: Tensor) -> Tensor:
    """The unbiased estimate of the squared maximum mean discrepancy."""
    size = len(x_SD)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T + 1) ** 3

    def without_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (size * (size - 1))

    return without_diagonal(kernel(x_SD, x_SD)) + without_diagonal(kernel(y_SD, y_SD)) - 2 * kernel(x_SD, y_SD).mean()
