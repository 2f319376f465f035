"""Distances of distributions: laws, few images, and the numbers of torchmetrics from the same features and images."""

import sys
import time

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from slimstep.eval.metrics.distribution import coverage, frechet_distance, kernel_distance
from slimstep.eval.metrics.inception import Inception


def normal(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_images(n, size, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=draw).to(torch.uint8)


def test_distances_of_distributions():
    """None to itself; Gaussians apart by d have the Fréchet distance d²; the kernel's is unbiased around zero."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, generator=draw, dtype=torch.float64)
    shift = torch.tensor([3.0, 0, 0, 0])
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + shift) == pytest.approx(9, abs=1e-6)
    unit = torch.nn.functional.normalize(x, dim=1)
    far = torch.nn.functional.normalize(x + shift, dim=1)
    same, apart = kernel_distance(unit[:2000], unit[2000:]), kernel_distance(unit, far)
    assert abs(same.mean) < same.se and apart.mean > 5 * apart.se


@pytest.mark.parametrize(("n", "m", "width"), [(200, 150, 6), (200, 5, 6), (4, 9, 6), (2, 2, 6)])
def test_the_frechet_distance_is_that_of_the_covariances(n, m, width):
    """Many images and few: where there are fewer than features, covariances are singular."""
    a, b = normal(n, width), 2 * normal(m, width, seed=1) + 1
    mean = a.mean(0) - b.mean(0)
    regular = 1e-13 * torch.eye(width)
    roots = [torch.from_numpy(sqrtm((x.T.cov() + regular).numpy()).real) for x in (a, b)]
    expected = mean @ mean + a.T.cov().trace() + b.T.cov().trace() - 2 * torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), abs=1e-4)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_coverage_of_the_real_set_by_itself_is_1_and_of_a_collapsed_or_distant_set_near_0():
    real = normal(400, 8)
    itself = coverage(real, real)
    assert itself.coverage == 1 and itself.density == pytest.approx(1 + 1 / itself.k)  # k neighbours, and the image
    collapsed, distant = coverage(real[:1].expand(400, 8), real), coverage(real + 100, real)
    assert collapsed.coverage < 0.1 and (distant.coverage, distant.density) == (0, 0)
    middle = coverage(0.3 * real, real)  # at the middle of the real ones: likely images, and few of their kinds
    assert middle.density > 2 and middle.coverage < 0.8 * middle.expected


@pytest.mark.parametrize(("n", "m", "k"), [(300, 300, 5), (60, 300, 5), (20, 60, 3), (3, 4, 5), (2, 2, 5)])
def test_two_sets_of_one_distribution_have_density_1_and_the_expected_coverage(n, m, k):
    trials = [coverage(normal(n, 3, 2 * s), normal(m, 3, 2 * s + 1), k) for s in range(40)]
    density, covered = (np.array([getattr(t, name) for t in trials]) for name in ("density", "coverage"))
    assert {t.k for t in trials} == {min(k, m - 1)} and len({t.expected for t in trials}) == 1
    error = 4 * covered.std(ddof=1) / len(trials) ** 0.5
    assert covered.mean() == pytest.approx(trials[0].expected, abs=error)
    assert density.mean() == pytest.approx(1, abs=4 * density.std(ddof=1) / len(trials) ** 0.5)


def test_coverage_is_what_the_definition_says():
    made, real, k = normal(7, 2), normal(9, 2, 1), 2
    inside = []
    for i, x in enumerate(real):
        others = sorted((x - y).norm().item() for j, y in enumerate(real) if j != i)
        inside.append([(x - y).norm().item() <= others[k - 1] for y in made])
    found = coverage(made, real, k)
    assert found.coverage == pytest.approx(np.mean([any(row) for row in inside]))
    assert found.density == pytest.approx(np.sum(inside) / (k * len(made)))


def test_few_images_of_many_features_are_quick_and_real():
    x, y = normal(64, 2048), normal(50, 2048, seed=1)
    start = time.process_time()
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert 0 < frechet_distance(x, y) < 2 * 2048
    assert frechet_distance(x[:2], y[:2] + 1) > 2048
    assert time.process_time() - start < 5


@pytest.mark.slow
def test_many_images_of_many_features_take_seconds():
    x, y = normal(3000, 2048), normal(2500, 2048, seed=1)
    start = time.process_time()
    assert 0 < frechet_distance(x, y) < 2048
    assert time.process_time() - start < 120


class Pixels(nn.Module):
    """Pixels as features: what torchmetrics calls a feature extractor."""

    num_features = 12

    def forward(self, images):
        return images.flatten(1).double()


def measured(metric, real, made):
    metric.update(real, real=True)
    metric.update(made, real=False)
    return metric.compute()


def test_distances_are_those_of_torchmetrics_for_the_same_features():
    real, made = random_images(60, 2, 0), random_images(50, 2, 1) // 2
    fid = measured(FrechetInceptionDistance(feature=Pixels()).set_dtype(torch.float64), real, made)
    features = Pixels()(made), Pixels()(real)
    assert frechet_distance(*features) == pytest.approx(fid.item(), rel=1e-5)
    kid, _ = measured(KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=50), real[:50], made)
    ours = kernel_distance(features[0], features[1][:50], divisor=Pixels.num_features, size=50)
    assert ours.mean == pytest.approx(kid.item(), rel=1e-5)


def torchmetrics_fid(file):
    """Its own resizing left out: torch-fidelity's is that of the TensorFlow original."""
    return FrechetInceptionDistance(feature_extractor_weights_path=file, antialias=False)


def test_inception_features_of_images_of_any_size_are_those_of_torchmetrics(inception_file):
    extract, theirs = Inception(inception_file), torchmetrics_fid(inception_file).inception
    for size in (40, 310):
        features = extract(random_images(2, size, 0))
        assert features.shape == (2, 2048) and features.std(0).max() > 0.01
        torch.testing.assert_close(features, theirs(random_images(2, size, 0)))


@pytest.mark.slow
def test_the_fid_of_images_is_that_of_torchmetrics(inception_file):
    real, made = random_images(6, 40, 0), random_images(5, 40, 1) // 2
    extract = Inception(inception_file)
    expected = measured(torchmetrics_fid(inception_file), real, made)
    assert frechet_distance(extract(made), extract(real)) == pytest.approx(expected.item(), rel=1e-3)


def test_inception_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, inception_file):
    with pytest.raises(
        ValueError, match=r"evaluation.inception=/no/such.pth does not exist; bring https://github.com/"
    ):
        Inception("/no/such.pth")
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match=r"other.pth does not hold InceptionV3's weights \(RuntimeError\)"):
        Inception(other)
    torch.save({"weight": Pixels()}, other)  # a pickle that would import, and could run, any code
    with pytest.raises(ValueError, match=r"InceptionV3's weights \(UnpicklingError\)"):
        Inception(other)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        Inception(inception_file)
