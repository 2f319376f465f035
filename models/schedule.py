"""The forward process and its inversions, z_t = α_t x0 + σ_t ε, for ε-, v- and sample-prediction.

Axes: B batch, C channels, H and W latent height and width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseSchedule:
    """α_t and σ_t (variance preserving: α² + σ² = 1) of a network's training timesteps, and what it predicts."""

    alpha_T: Tensor
    sigma_T: Tensor
    prediction_type: str

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {self.prediction_type!r} is unknown; choose from {PREDICTION_TYPES}")

    @classmethod
    def from_scheduler(cls, scheduler, device: str | torch.device = "cpu") -> "NoiseSchedule":
        """The schedule of any diffusers scheduler that carries `alphas_cumprod`, zero terminal SNR included."""
        alpha_bar_T = scheduler.alphas_cumprod.to(device=device, dtype=torch.float64)
        return cls(alpha_bar_T.sqrt().float(), (1 - alpha_bar_T).sqrt().float(), scheduler.config.prediction_type)

    def __len__(self) -> int:
        return len(self.alpha_T)

    def to(self, device: str | torch.device) -> "NoiseSchedule":
        return NoiseSchedule(self.alpha_T.to(device), self.sigma_T.to(device), self.prediction_type)

    def at(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t, shaped [B, 1, 1, 1]."""
        return self.alpha_T[t_B][:, None, None, None], self.sigma_T[t_B][:, None, None, None]

    def snr(self, t_B: Tensor) -> Tensor:
        """Signal-to-noise ratio α²/σ², shaped [B]; 0 at the last timestep of a zero-terminal-SNR schedule."""
        return (self.alpha_T[t_B] / self.sigma_T[t_B]) ** 2

    def noisy(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """z_t = α x0 + σ ε."""
        alpha, sigma = self.at(t_B)
        return alpha * x0_BCHW + sigma * noise_BCHW

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What the network has to predict: ε, v = α ε − σ x0 (Salimans & Ho 2022, section 4), or x0."""
        if self.prediction_type == "epsilon":
            return noise_BCHW
        if self.prediction_type == "sample":
            return x0_BCHW
        alpha, sigma = self.at(t_B)
        return alpha * noise_BCHW - sigma * x0_BCHW

    def x0(self, pred_BCHW: Tensor, z_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The clean latents a prediction at z_t stands for; infinite for ε-prediction where α_t = 0."""
        alpha, sigma = self.at(t_B)
        if self.prediction_type == "epsilon":
            return (z_BCHW - sigma * pred_BCHW) / alpha
        return pred_BCHW if self.prediction_type == "sample" else alpha * z_BCHW - sigma * pred_BCHW

    def eps(self, pred_BCHW: Tensor, z_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The noise a prediction at z_t stands for."""
        alpha, sigma = self.at(t_B)
        if self.prediction_type == "epsilon":
            return pred_BCHW
        if self.prediction_type == "sample":
            return (z_BCHW - alpha * pred_BCHW) / sigma
        return sigma * z_BCHW + alpha * pred_BCHW
