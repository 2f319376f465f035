"""Conversion to v-prediction: before its steps are distilled, a network learns to predict v (SnapFusion, section 4).

Axes: B batch, C channels, H and W latent size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimstep.engine.checks import check_fraction
from slimstep.engine.objective import Batch, Metrics
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import Denoiser
from slimstep.models.denoising import draw_noisy
from slimstep.models.noise_schedule import NoiseSchedule


@dataclass(eq=False)
class Denoising:
    """L_ori: the denoising loss of what `schedule` says the network predicts."""

    denoiser: Denoiser
    schedule: NoiseSchedule
    uncond: Conditioning
    teacher: nn.Module
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_fraction("v_prediction.objective", caption_dropout=self.caption_dropout)

    def __call__(self, unet: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        noisy = draw_noisy(batch, self.schedule, self.uncond, self.caption_dropout, generator)
        return nn.functional.mse_loss(self.denoiser(unet, *noisy.inputs), noisy.target_BCHW), {}
