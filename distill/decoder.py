"""Decoder distillation: a pruned VAE decoder learns to give the teacher decoder's images (SnapFusion, section 3.2).

Axes: B batch, C channels, F frames, H and W height and width. What is written BCHW is BCFHW of videos.
"""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
from torchvision.models import VGG16_Weights

from slimstep.engine.checks import check_not_negative
from slimstep.engine.objective import Batch, Metrics
from slimstep.models.decoding import CausalDecoder, VideoDecoder, WanDecoder


class DecoderDistillation:
    """A weighted sum of distances between the pruned and the teacher decoder's image of the same latents, in [−1, 1].

    `mse` alone is the paper's. `l1` is the mean absolute error, `gradient` that of the differences between neighbouring
    pixels (edges), `temporal` that of the differences between neighbouring frames (flicker), `lpips` the learned
    perceptual distance (Zhang et al. 2018, VGG-16), of videos frame by frame.

    A step learns from one of the chunks of latents in which a video is decoded, `latents_at_once` of them, all for
    None; where the last is shorter, from as many at the end. Where a decoder sees the frames before (CogVideoX, Wan) it
    is the first chunk alone.

    Raises ValueError where no weight is above zero, where `lpips` is and VGG-16's weights are not in torch's cache, or
    `temporal` is and no two frames are decoded together.
    """

    def __init__(
        self, teacher: nn.Module, mse: float = 1.0, l1: float = 0.0, gradient: float = 0.0, lpips: float = 0.0,
        temporal: float = 0.0, latents_at_once: int | None = None,
    ):  # fmt: skip
        self.weights = {"mse": mse, "l1": l1, "gradient": gradient, "lpips": lpips, "temporal": temporal}
        check_not_negative("objective", **self.weights)
        if not any(self.weights.values()):
            raise ValueError("objective: all of mse, l1, gradient, lpips and temporal are 0; nothing would be learned")
        self.from_first = isinstance(teacher, (CausalDecoder, WanDecoder))
        if temporal and (latents_at_once == 1 or not isinstance(teacher, VideoDecoder)):
            alone = "model.video.decode_chunk_size=1" if isinstance(teacher, VideoDecoder) else "a decoder of images"
            raise ValueError(f"objective.temporal={temporal:g} compares neighbouring frames, and {alone} decodes each "
                             "alone: set 0")  # fmt: skip
        self.teacher, self.latents_at_once = teacher, latents_at_once
        self.lpips = lpips_network().to(next(teacher.parameters()).device) if lpips else None

    def __call__(self, decoder: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        z_BCHW = batch["latents"]
        if self.from_first:
            z_BCHW = z_BCHW[:, :, : self.latents_at_once]
        elif z_BCHW.ndim == 5:
            z_BCHW = one_chunk(z_BCHW, self.latents_at_once, generator)
        with torch.no_grad(), torch.autocast(z_BCHW.device.type, enabled=False):
            target_B3HW = self.teacher(z_BCHW).float()
        image_B3HW = decoder(z_BCHW).float()
        metrics = {
            name: self.distance(name, image_B3HW, target_B3HW) for name, weight in self.weights.items() if weight
        }
        return cast(Tensor, sum(self.weights[name] * value for name, value in metrics.items())), metrics

    def distance(self, name: str, image_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
        if name == "mse":
            return nn.functional.mse_loss(image_B3HW, target_B3HW)
        if name == "l1":
            return nn.functional.l1_loss(image_B3HW, target_B3HW)
        if name == "gradient":
            error = image_B3HW - target_B3HW
            return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        if name == "temporal":
            return (image_B3HW - target_B3HW).diff(dim=2).abs().mean()
        assert self.lpips is not None, f"{name} has no weight"
        images, targets = (as_images(x).clamp(-1, 1) for x in (image_B3HW, target_B3HW))
        return self.lpips(images, targets).mean()


def one_chunk(z_BCFHW: Tensor, latents_at_once: int | None, generator: torch.Generator) -> Tensor:
    """The frames of a random one of the chunks in which videos are decoded; all chunks are of one size."""
    frames = z_BCFHW.shape[2]
    size = min(latents_at_once or frames, frames)
    chunk = int(torch.randint(-(-frames // size), (1,), generator=generator, device=generator.device))
    start = min(chunk * size, frames - size)
    return z_BCFHW[:, :, start : start + size]


def as_images(x_B3HW: Tensor) -> Tensor:
    return x_B3HW if x_B3HW.ndim == 4 else x_B3HW.transpose(1, 2).flatten(0, 1)


def lpips_network() -> nn.Module:
    """LPIPS on VGG-16, frozen. ValueError where VGG-16's weights would have to be fetched."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG16_Weights.IMAGENET1K_V1.url).name
    if not file.is_file():
        raise ValueError(f"objective.lpips needs VGG-16's weights: put {VGG16_Weights.IMAGENET1K_V1.url} at {file}")
    return LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.requires_grad_(False)
