"""The random half of a denoising step, shared by every objective that learns from clean latents.

Axes: B batch, C channels, H and W latent size, L text tokens, E text width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimstep.models.noise_schedule import NoiseSchedule, add_noise, target_of


@dataclass(frozen=True)
class NoisyBatch:
    """Latents at random timesteps, their texts (some replaced by the empty caption), and what to predict."""

    noisy_BCHW: Tensor
    t_B: Tensor
    text_BLE: Tensor
    target_BCHW: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The positional arguments of a UNet."""
        return self.noisy_BCHW, self.t_B, self.text_BLE

    def inputs_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The same for a UNet in half precision, as a teacher may be."""
        return self.noisy_BCHW.to(dtype), self.t_B, self.text_BLE.to(dtype)


def draw_noisy(
    batch: dict[str, Tensor],
    schedule: NoiseSchedule,
    empty_text_LE: Tensor,
    caption_dropout: float,
    generator: torch.Generator,
) -> NoisyBatch:
    """Uniform timesteps, Gaussian noise, and captions dropped with probability `caption_dropout` for guidance."""
    x0_BCHW, text_BLE = batch["latents"], batch["text"]
    draw = {"generator": generator, "device": x0_BCHW.device}
    t_B = schedule.sample_times(len(x0_BCHW), generator)
    noise_BCHW = torch.randn(x0_BCHW.shape, **draw)
    dropped_B = torch.rand(len(x0_BCHW), **draw) < caption_dropout
    text_BLE = torch.where(dropped_B[:, None, None], empty_text_LE, text_BLE)
    level = schedule.alpha_sigma(t_B)
    target_BCHW = target_of(x0_BCHW, noise_BCHW, level, schedule.prediction_type)
    return NoisyBatch(add_noise(x0_BCHW, noise_BCHW, level), t_B, text_BLE, target_BCHW)
