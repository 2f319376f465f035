"""What a metric is: one class and one file of configs/metric, for every job that evaluates.

A per-image metric scores an image with its prompt; a paired one the distance to the reference's image of the same
noise; a distribution metric all images together, beside real ones. `metrics.NAME._target_` makes one, and is given the
device and the job's scorer where its constructor takes them.

Axes: B images, P all images, R real images, D features, H and W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torchmetrics.functional.image import structural_similarity_index_measure

from slimstep.eval.metrics.clip import ClipScorer, psnr
from slimstep.eval.metrics.distribution import coverage, frechet_distance, kernel_distance
from slimstep.eval.metrics.inception import Inception

Kind = Literal["per_image", "paired", "distribution"]


class Metric:
    """A value for every image: `metric(images, prompts, reference)` gives float32 [B] on the CPU.

    `images` and, of a paired metric, `reference` are uint8 [B, 3, H, W], or what was sampled (latents [B, C, h, w],
    pixels) where `reads` is "samples". Where it is `of` videos, `images` are uint8 [B, F, H, W, 3], and a value is a
    video's (eval/metrics/video.py). `better` says which end of the scale is the good one; with `compared_by_ratio`
    models are compared by the ratio of their means, too.
    """

    kind: Kind = "per_image"
    better: Literal["high", "low"] = "high"
    reads: Literal["images", "samples"] = "images"
    of: Literal["images", "videos"] = "images"
    compared_by_ratio: bool = False

    @property
    def protocol(self) -> Mapping[str, Any]:
        """What makes its values comparable."""
        return {}

    def prepare(self, prompts: Sequence[str]) -> None:
        """Called with all prompts before any of their images."""

    def __call__(self, images: Tensor, prompts: Sequence[str], reference: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class DistributionMetric(Metric):
    """Numbers for all images together: `distances(features of images, features of real images)`."""

    kind = "distribution"
    better = "low"

    def features(self, images_B3HW: Tensor) -> Tensor:
        """Float32 [B, D]."""
        raise NotImplementedError

    def distances(self, made_PD: Tensor, real_RD: Tensor) -> dict[str, Any]:
        raise NotImplementedError


class ClipScore(Metric):
    """The scorer's score of every image for its prompt, whose features are made once for all prompts."""

    def __init__(self, scorer: ClipScorer):
        self.scorer = scorer
        self.text: dict[str, Tensor] = {}

    @property
    def protocol(self) -> Mapping[str, Any]:
        return self.scorer.protocol

    def prepare(self, prompts: Sequence[str]) -> None:
        if not self.text.keys() >= set(prompts):
            self.text = dict(zip(prompts, self.scorer.text(prompts), strict=True))

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str], reference: Tensor | None = None) -> Tensor:
        self.prepare(prompts)
        return self.scorer.score(images_B3HW, torch.stack([self.text[prompt] for prompt in prompts]))


class Preference(Metric):
    """Any callable `(images, prompts) -> scores`."""

    def __init__(self, score: Callable[[Tensor, list[str]], Tensor]):
        self.score = score

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str], reference: Tensor | None = None) -> Tensor:
        return self.score(images_B3HW, list(prompts))


class PairedMetric(Metric):
    """A distance, or nearness, to the reference's image of the same noise: `compare(image, reference)` gives [B]."""

    kind = "paired"

    def __call__(self, images: Tensor, prompts: Sequence[str], reference: Tensor | None = None) -> Tensor:
        assert reference is not None, f"{type(self).__name__} compares with a reference, and there is none"
        return self.compare(images, reference)

    def compare(self, images: Tensor, reference: Tensor) -> Tensor:
        raise NotImplementedError


class Psnr(PairedMetric):
    """Peak signal-to-noise ratio in dB to the reference's image."""

    def compare(self, images: Tensor, reference: Tensor) -> Tensor:
        return psnr(images, reference)


class Ssim(PairedMetric):
    """Structural similarity to the reference's image (Wang et al. 2004)."""

    def compare(self, images: Tensor, reference: Tensor) -> Tensor:
        one, other = images.float() / 255, reference.float() / 255
        values = structural_similarity_index_measure(one, other, data_range=1.0, reduction="none")
        assert isinstance(values, Tensor), "torchmetrics gives more only when it is asked for more"
        return values.reshape(len(images))


class FeatureSimilarity(PairedMetric):
    """Cosine of the scorer's features of an image and the reference's."""

    def __init__(self, scorer: ClipScorer):
        self.scorer = scorer

    def compare(self, images: Tensor, reference: Tensor) -> Tensor:
        return (self.scorer.image(images) * self.scorer.image(reference)).sum(1)


class SampleError(PairedMetric):
    """Mean squared error of what was sampled (latents, or pixels of models without a VAE) to the reference's."""

    better = "low"
    reads = "samples"

    def compare(self, images: Tensor, reference: Tensor) -> Tensor:
        return (images - reference).square().flatten(1).mean(1)


class ImageError(PairedMetric):
    """Mean squared error to the reference's image, in percent of the squared range."""

    better = "low"

    def compare(self, images: Tensor, reference: Tensor) -> Tensor:
        return 100 * ((images.float() - reference.float()) / 255).square().flatten(1).mean(1).cpu()


def covered(made_PD: Tensor, real_RD: Tensor) -> dict[str, Any]:
    """Coverage and density as a distribution metric's numbers."""
    found = coverage(made_PD, real_RD)
    return {"coverage": found.coverage, "coverage_expected": found.expected, "density": found.density, "k": found.k}


class PixelDistance(DistributionMetric):
    """Fréchet (fd) and kernel distance (kd), coverage and density of images shrunk to 8×8 pixels: colours and layout,
    where no network of features is there."""

    def features(self, images_B3HW: Tensor) -> Tensor:
        return adaptive_avg_pool2d(images_B3HW.float() / 255, 8).flatten(1)

    def distances(self, made_PD: Tensor, real_RD: Tensor) -> dict[str, Any]:
        kd = kernel_distance(made_PD, real_RD, divisor=made_PD.shape[1])
        return {"fd": frechet_distance(made_PD, real_RD), "kd": kd.mean, "kd_se": kd.se, "features": "8×8 pixels",
                **covered(made_PD, real_RD)}  # fmt: skip


class FeatureDistance(DistributionMetric):
    """Fréchet (fd) and kernel distance (kd), coverage and density of the scorer's unit features beside real images'."""

    def __init__(self, scorer: ClipScorer):
        self.scorer = scorer

    def features(self, images_B3HW: Tensor) -> Tensor:
        return self.scorer.image(images_B3HW).float()

    def distances(self, made_PD: Tensor, real_RD: Tensor) -> dict[str, Any]:
        kd = kernel_distance(made_PD, real_RD)
        return {"fd": frechet_distance(made_PD, real_RD), "kd": kd.mean, "kd_se": kd.se,
                "features": f"{self.scorer.protocol['model']}, unit features",
                **covered(made_PD, real_RD)}  # fmt: skip


class InceptionDistance(DistributionMetric):
    """FID and KID, coverage and density: the same of InceptionV3's features."""

    def __init__(self, inception: Inception):
        self.inception = inception

    def features(self, images_B3HW: Tensor) -> Tensor:
        return self.inception(images_B3HW)

    def distances(self, made_PD: Tensor, real_RD: Tensor) -> dict[str, Any]:
        kid = kernel_distance(made_PD, real_RD, divisor=made_PD.shape[1])
        return {"fid": frechet_distance(made_PD, real_RD), "kid": kid.mean, "kid_se": kid.se,
                **covered(made_PD, real_RD)}  # fmt: skip


def as_metric(made: Metric | Callable[[Tensor, list[str]], Tensor]) -> Metric:
    """The metric itself, or a per-image one of a plain callable; a ClipScorer's text features are kept."""
    if isinstance(made, Metric):
        return made
    return ClipScore(made) if isinstance(made, ClipScorer) else Preference(made)


def of_kind(metrics: Mapping[str, Metric], *kinds: Kind) -> dict[str, Metric]:
    return {name: metric for name, metric in metrics.items() if metric.kind in kinds}
