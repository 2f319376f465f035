"""What is said of videos: what metrics of images say of their frames, whether neighbours agree, and whether they move.

A student that draws good frames may still flicker, or stand still: the frames' scores, their consistency and their
motion are to be read together. Nothing here estimates optical flow: features of neighbouring frames are compared as
they are, so consistency falls with honest motion, too, and is paired with the reference's.

Axes: B videos, F frames, H and W pixels, D features. A video is uint8 [F, H, W, 3].
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.distribution import frechet_distance, kernel_distance
from slimstep.eval.metrics.metric import DistributionMetric, Metric, PairedMetric, covered
from slimstep.eval.metrics.video_features import I3DFeatures, VideoFeatures, VideoMAE

Reduction = Literal["mean", "worst"]
latest: list[tuple[weakref.ref, Tensor]] = []  # videos as last seen, and their frames


def frames_of(videos_BFHW3: Tensor) -> Tensor:
    """The frames as images, uint8 [B·F, 3, H, W], without a copy: of the same videos the same tensor, so that a scorer
    that knows a tensor again computes their features once."""
    for videos, frames in latest:
        if videos() is videos_BFHW3:
            return frames
    shape = tuple(videos_BFHW3.shape)
    assert videos_BFHW3.dtype == torch.uint8 and len(shape) == 5 and shape[-1] == 3, (
        f"videos are {videos_BFHW3.dtype} {shape}, not uint8 [B, F, H, W, 3]"
    )
    frames = videos_BFHW3.flatten(0, 1).permute(0, 3, 1, 2)
    latest[:] = [(weakref.ref(videos_BFHW3), frames), *latest[:1]]
    return frames


class OfFrames(Metric):
    """A per-image or paired metric of every frame: the mean over a video's frames, or its worst one."""

    of = "videos"

    def __init__(self, metric: Metric, reduction: Reduction = "mean"):
        assert metric.of == "images" and metric.reads == "images", f"{type(metric).__name__} is no metric of images"
        self.metric, self.reduction = metric, reduction
        self.kind, self.better = metric.kind, metric.better

    @property
    def protocol(self) -> Mapping[str, Any]:
        return {**self.metric.protocol, "frames": self.reduction}

    def prepare(self, prompts: Sequence[str]) -> None:
        self.metric.prepare(prompts)

    def __call__(self, videos_BFHW3: Tensor, prompts: Sequence[str], reference: Tensor | None = None) -> Tensor:
        count = videos_BFHW3.shape[1]
        each = [prompt for prompt in prompts for _ in range(count)]
        beside = None if reference is None else frames_of(reference)
        values_BF = self.metric(frames_of(videos_BFHW3), each, beside).unflatten(0, (-1, count))
        if self.reduction == "mean":
            return values_BF.mean(1)
        return values_BF.amin(1) if self.better == "high" else values_BF.amax(1)


class TemporalConsistency(Metric):
    """The mean cosine of the scorer's features of neighbouring frames: 1 for a video that stands still."""

    of = "videos"

    def __init__(self, scorer: ClipScorer):
        self.scorer = scorer

    def __call__(self, videos_BFHW3: Tensor, prompts: Sequence[str], reference: Tensor | None = None) -> Tensor:
        check_neighbours(videos_BFHW3)
        features_BFD = self.scorer.image(frames_of(videos_BFHW3)).float().unflatten(0, (len(videos_BFHW3), -1))
        return (features_BFD[:, 1:] * features_BFD[:, :-1]).sum(-1).mean(1).cpu()


class Motion(Metric):
    """The mean absolute difference of neighbouring frames in percent of the range: 0 for a video that stands still.

    Models are compared by the ratio of their means, too: far below 1, a student has stopped moving. Flicker is motion
    here; consistency tells it apart.
    """

    of = "videos"
    compared_by_ratio = True

    def __call__(self, videos_BFHW3: Tensor, prompts: Sequence[str], reference: Tensor | None = None) -> Tensor:
        check_neighbours(videos_BFHW3)
        return torch.stack([motion(video) for video in videos_BFHW3]).cpu()


class TemporalError(PairedMetric):
    """The mean absolute difference between how neighbouring frames differ and how the reference's do, in percent of the
    range: 0 for the same video, and for one with the same error in every frame. Flicker alone counts."""

    of = "videos"
    better = "low"

    def compare(self, images: Tensor, reference: Tensor) -> Tensor:
        check_neighbours(images)
        errors = (one.short() - other.short() for one, other in zip(images, reference, strict=True))
        return torch.stack([100 / 255 * (error[1:] - error[:-1]).abs().float().mean() for error in errors]).cpu()


def motion(video_FHW3: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring frames, in percent of the range."""
    video = video_FHW3.short()
    return 100 / 255 * (video[1:] - video[:-1]).abs().float().mean()


def check_neighbours(videos_BFHW3: Tensor) -> None:
    if (count := videos_BFHW3.shape[1]) < 2:
        raise ValueError(f"videos of {count} frame have no neighbouring frames to compare: sample 2 or more")


class FrameDistance(DistributionMetric):
    """A distribution metric of images, of the mean over a video's frames of what it takes for features."""

    of = "videos"

    def __init__(self, metric: DistributionMetric):
        self.metric = metric

    def features(self, videos_BFHW3: Tensor) -> Tensor:
        return self.metric.features(frames_of(videos_BFHW3)).unflatten(0, (len(videos_BFHW3), -1)).mean(1)

    def distances(self, made_PD: Tensor, real_RD: Tensor) -> dict[str, Any]:
        found = self.metric.distances(made_PD, real_RD)
        return {**found, "features": f"{found['features']}, mean over frames"}


class VideoDistance(DistributionMetric):
    """Fréchet video distance (Unterthiner et al. 2018, arXiv 1812.01717), kernel distance, coverage and density of the
    features of a network that sees whole videos. Distances of different networks, and of other numbers of frames,
    cannot be compared: `features` says which."""

    of = "videos"

    def __init__(self, network: VideoFeatures):
        self.network = network

    @property
    def protocol(self) -> Mapping[str, Any]:
        return {"features": self.network.name}

    def features(self, videos_BFHW3: Tensor) -> Tensor:
        return self.network(videos_BFHW3).float().cpu()

    def distances(self, made_PD: Tensor, real_RD: Tensor) -> dict[str, Any]:
        kd = kernel_distance(made_PD, real_RD, divisor=made_PD.shape[1])
        return {"fvd": frechet_distance(made_PD, real_RD), "kvd": kd.mean, "kvd_se": kd.se,
                "features": self.network.name, **covered(made_PD, real_RD)}  # fmt: skip


def videomae_distance(folder: str, device: str | torch.device = "cpu") -> VideoDistance:
    return VideoDistance(VideoMAE(folder, device))


def i3d_distance(file: str, device: str | torch.device = "cpu") -> VideoDistance:
    return VideoDistance(I3DFeatures(file, device))


def on_videos(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """The metrics as metrics of videos: of those of images the mean over the frames."""
    return {name: on_frames(metric) for name, metric in metrics.items()}


def on_frames(metric: Metric) -> Metric:
    if metric.of == "videos" or metric.reads == "samples":
        return metric
    return FrameDistance(metric) if isinstance(metric, DistributionMetric) else OfFrames(metric)


def video_metrics(scorer: ClipScorer | None, clip: Metric | None) -> dict[str, Metric]:
    """What is measured of all videos: `clip` is the scorer's metric of images, None where there are no captions."""
    of_captions = {"clip": OfFrames(clip), "clip_worst_frame": OfFrames(clip, "worst")} if clip else {}
    of_features = {"consistency": TemporalConsistency(scorer)} if scorer else {}
    return {**of_captions, **of_features, "motion": Motion()}


def features_of(scorer: ClipScorer, images: Tensor) -> Tensor:
    """[B, D]: the scorer's features of images [B, 3, H, W], or of videos [B, F, H, W, 3] their mean over frames."""
    if images.ndim == 4:
        return scorer.image(images)
    return scorer.image(frames_of(images)).unflatten(0, (len(images), -1)).mean(1)
