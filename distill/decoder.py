"""Decoder distillation: a pruned VAE decoder learns to give the teacher decoder's images (SnapFusion, section 3.2).

Axes: B batch, C channels, H and W height and width.
"""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
from torchvision.models import VGG16_Weights

from slimstep.engine.checks import check_not_negative
from slimstep.engine.objective import Batch, Metrics


class DecoderDistillation:
    """A weighted sum of distances between the pruned and the teacher decoder's image of the same latents, in [−1, 1].

    `mse` alone is the paper's. `l1` is the mean absolute error, `gradient` that of the differences between neighbouring
    pixels (edges), `lpips` the learned perceptual distance (Zhang et al. 2018, VGG-16). Raises ValueError where no
    weight is above zero, or where `lpips` is and VGG-16's weights are not in torch's cache.
    """

    def __init__(
        self, teacher: nn.Module, mse: float = 1.0, l1: float = 0.0, gradient: float = 0.0, lpips: float = 0.0
    ):
        self.weights = {"mse": mse, "l1": l1, "gradient": gradient, "lpips": lpips}
        check_not_negative("objective", **self.weights)
        if not any(self.weights.values()):
            raise ValueError("objective: all of mse, l1, gradient and lpips are 0; nothing would be learned")
        self.teacher = teacher
        self.lpips = lpips_network().to(next(teacher.parameters()).device) if lpips else None

    def __call__(self, decoder: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        with torch.no_grad(), torch.autocast(batch["latents"].device.type, enabled=False):
            target_B3HW = self.teacher(batch["latents"]).float()
        image_B3HW = decoder(batch["latents"]).float()
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
        assert self.lpips is not None, f"{name} has no weight"
        return self.lpips(image_B3HW.clamp(-1, 1), target_B3HW.clamp(-1, 1)).mean()


def lpips_network() -> nn.Module:
    """LPIPS on VGG-16, frozen. ValueError where VGG-16's weights would have to be fetched."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG16_Weights.IMAGENET1K_V1.url).name
    if not file.is_file():
        raise ValueError(f"objective.lpips needs VGG-16's weights: put {VGG16_Weights.IMAGENET1K_V1.url} at {file}")
    return LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.requires_grad_(False)
