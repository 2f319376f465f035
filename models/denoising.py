"""The random half of a denoising step, shared by every objective that learns from clean latents.

Axes: B batch, C channels, H and W latent size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimstep.models.conditioning import Conditioning, conditioning_of
from slimstep.models.noise_schedule import NoiseSchedule, add_noise, target_of


@dataclass(frozen=True)
class NoisyBatch:
    """Latents at random timesteps, their conditioning (some captions are dropped), and what to predict."""

    noisy_BCHW: Tensor
    t_B: Tensor
    cond: Conditioning
    target_BCHW: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Conditioning]:
        """What a denoiser takes beside the network."""
        return self.noisy_BCHW, self.t_B, self.cond


def draw_noisy(
    batch: dict[str, Tensor],
    schedule: NoiseSchedule,
    uncond: Conditioning,
    caption_dropout: float,
    generator: torch.Generator,
) -> NoisyBatch:
    """Uniform timesteps, Gaussian noise, and captions dropped with probability `caption_dropout` for guidance."""
    x0_BCHW = batch["latents"]
    device = x0_BCHW.device
    t_B = schedule.sample_times(len(x0_BCHW), generator)
    noise_BCHW = torch.randn(x0_BCHW.shape, generator=generator, device=device)
    keep_B = torch.rand(len(x0_BCHW), generator=generator, device=device) >= caption_dropout
    cond, level = conditioning_of(batch, like=uncond).where(keep_B, uncond), schedule.alpha_sigma(t_B)
    target_BCHW = target_of(x0_BCHW, noise_BCHW, level, schedule.prediction_type)
    return NoisyBatch(add_noise(x0_BCHW, noise_BCHW, level), t_B, cond, target_BCHW)
