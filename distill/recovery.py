"""Recovery: a pruned UNet learns to give its teacher's output and features again (BK-SDM, section 3.2).

Axes: B batch, C channels, H and W latent size.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from slimstep.distill.features import features_of
from slimstep.engine.checks import check_fraction, check_not_negative
from slimstep.engine.objective import Batch, Metrics, Requirements
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import Denoiser
from slimstep.models.denoising import draw_noisy
from slimstep.models.noise_schedule import NoiseSchedule


@dataclass(eq=False)
class Recovery:
    """`denoising_weight` · denoising loss + `output_weight` · output distillation + `feature_weight` · feature
    distillation. Without the first the data give inputs alone, and the teacher all targets: what a teacher of few
    steps gives at its timesteps is an image, and what the data give there is a mean of many.

    Features are the outputs of every down, mid and up level. Each level's squared error is divided by the teacher's
    mean square there (LAPTOP-Diff, section 3.3), so that no level drowns the others; BK-SDM uses the plain sum.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    uncond: Conditioning
    teacher: nn.Module
    output_weight: float = 1.0
    feature_weight: float = 0.5
    caption_dropout: float = 0.1
    denoising_weight: float = 1.0

    requires = Requirements(feature_hooks=True)

    def __post_init__(self) -> None:
        check_fraction("recovery.objective", caption_dropout=self.caption_dropout)
        names = ("denoising_weight", "output_weight", "feature_weight")
        check_not_negative("recovery.objective", **{name: getattr(self, name) for name in names})

    def __call__(self, unet: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        noisy = draw_noisy(batch, self.schedule, self.uncond, self.caption_dropout, generator)
        with features_of(self.teacher) as of_teacher, torch.no_grad():
            target_BCHW = self.denoiser(self.teacher, *noisy.inputs)
        with features_of(unet) as of_student:
            pred_BCHW = self.denoiser(unet, *noisy.inputs)
        # Where a level is gone, the one above it no longer shrinks what it gives.
        shared = [name for name in of_student if of_student[name].shape == of_teacher[name].shape]
        metrics = {
            "denoising": nn.functional.mse_loss(pred_BCHW, noisy.target_BCHW),
            "output": nn.functional.mse_loss(pred_BCHW, target_BCHW),
            "features": torch.stack([relative_error(of_student[name], of_teacher[name]) for name in shared]).mean(),
        }
        weights = {"denoising": self.denoising_weight, "output": self.output_weight, "features": self.feature_weight}
        return cast(Tensor, sum(weights[name] * value for name, value in metrics.items())), metrics


def relative_error(features: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error in units of the reference's mean square."""
    return (features.float() - reference.float()).square().mean() / reference.float().square().mean()
