"""The forward process and its inversions, z_t = α_t x0 + σ_t ε, for ε-, v- and sample-prediction; DDIM's time grids.

Axes: B batch, C channels, H and W latent height and width, T training timesteps, N steps of a student, K bounds.
"""

import copy
from dataclasses import dataclass, replace

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from slimstep.models.schedulers import check_noise_schedule

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseSchedule:
    """α_t and σ_t (variance preserving: α² + σ² = 1) of a network's training timesteps, and what it predicts.

    Timestep −1 is where a sampler's last step lands: `final_alpha`, 1 for clean latents.
    """

    alpha_T: Tensor
    sigma_T: Tensor
    prediction_type: str
    final_alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {self.prediction_type!r} is unknown; choose from {PREDICTION_TYPES}")

    @classmethod
    def from_scheduler(cls, scheduler, device: str | torch.device = "cpu") -> "NoiseSchedule":
        """The schedule of any diffusers scheduler that carries `alphas_cumprod`, zero terminal SNR included.

        Raises ValueError for others (EDM, flow matching), and for an unknown prediction type.
        """
        check_noise_schedule(scheduler)
        alpha_bar_T = scheduler.alphas_cumprod.to(device=device, dtype=torch.float64)
        final_alpha = float(getattr(scheduler, "final_alpha_cumprod", 1.0)) ** 0.5
        alpha_T, sigma_T = alpha_bar_T.sqrt().float(), (1 - alpha_bar_T).sqrt().float()
        return cls(alpha_T, sigma_T, scheduler.config.get("prediction_type"), final_alpha)

    def __len__(self) -> int:
        return len(self.alpha_T)

    def to(self, device: str | torch.device) -> "NoiseSchedule":
        return replace(self, alpha_T=self.alpha_T.to(device), sigma_T=self.sigma_T.to(device))

    def at(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t, shaped [B, 1, 1, 1]."""
        alpha_B = torch.where(t_B < 0, self.final_alpha, self.alpha_T[t_B])
        sigma_B = torch.where(t_B < 0, (1 - self.final_alpha**2) ** 0.5, self.sigma_T[t_B])
        return alpha_B[:, None, None, None], sigma_B[:, None, None, None]

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

    def ddim(self, pred_BCHW: Tensor, z_BCHW: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """z_s after one deterministic step from z_t: α_s x̂ + σ_s ε̂ (Song et al. 2021, equation 12 with η = 0)."""
        alpha, sigma = self.at(s_B)
        return alpha * self.x0(pred_BCHW, z_BCHW, t_B) + sigma * self.eps(pred_BCHW, z_BCHW, t_B)

    def x0_between(self, z_BCHW: Tensor, t_B: Tensor, z_s_BCHW: Tensor, s_B: Tensor) -> Tensor:
        """The x̂ with which one DDIM step from z_t lands on z_s (Salimans & Ho 2022, algorithm 2); float32 inside.

        x̃ = (z_s − (σ_s/σ_t) z_t) / (α_s − (σ_s/σ_t) α_t)
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.at(t_B), self.at(s_B)
        ratio = sigma_s / sigma_t
        return (z_s_BCHW.float() - ratio * z_BCHW.float()) / (alpha_s - ratio * alpha_t)

    def pred(self, x0_BCHW: Tensor, z_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What the network would have to predict at z_t to stand for x0; ε needs σ_t > 0."""
        if self.prediction_type == "sample":
            return x0_BCHW
        alpha, sigma = self.at(t_B)
        eps_BCHW = (z_BCHW - alpha * x0_BCHW) / sigma
        return eps_BCHW if self.prediction_type == "epsilon" else alpha * eps_BCHW - sigma * x0_BCHW


def sampler_steps(scheduler, steps: int) -> tuple[Tensor, Tensor]:
    """Where the steps of diffusers' DDIM, LCM or Euler sampler start and land, both [steps] timesteps; −1 is the end.

    Euler lands where the next step starts. DDIM lands T // steps below the start, which is one off the next start here
    and there where `steps` does not divide T, and for a few numbers (6, 15, 24 …) ends at timestep 0, not at the end.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    starts_N = scheduler.timesteps.cpu().long()
    if len(starts_N) != steps:
        raise ValueError(f"the scheduler makes {len(starts_N)} steps of {steps}; choose a divisor of its timesteps")
    if isinstance(scheduler, EulerDiscreteScheduler):
        return starts_N, torch.cat([starts_N[1:], torch.tensor([-1])])
    return starts_N, (starts_N - scheduler.config.num_train_timesteps // steps).clamp(min=-1)


def nested_steps(student_scheduler, steps: int, teacher_scheduler, teacher_steps: int) -> Tensor:
    """[N, K]: row n holds the timesteps of a student's step n: its start, the teacher's starts within, its end.

    Raises ValueError where the student's starts are not among the teacher's.
    """
    starts_N, ends_N = sampler_steps(student_scheduler, steps)
    teacher_starts, _ = sampler_steps(teacher_scheduler, teacher_steps)
    per_step, left = divmod(teacher_steps, steps)
    if left or not per_step or not torch.equal(teacher_starts[::per_step], starts_N):
        spacing = student_scheduler.config.timestep_spacing
        way_out = "" if spacing == "trailing" else ", and ladder.timestep_spacing=trailing"
        raise ValueError(
            f"{steps} steps do not nest in a teacher's {teacher_steps} with timestep_spacing={spacing!r}; the teacher "
            f"needs a multiple of them, as 32 of 16{way_out}"
        )
    return torch.cat([teacher_starts.view(steps, per_step), ends_N[:, None]], dim=1)
