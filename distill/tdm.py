"""Trajectory distribution matching (Luo et al. 2025, arXiv 2503.06674): each step of a few-step student by itself.

Axes: B batch; samples are [B, …].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimstep.distill.dmd import DistributionMatching
from slimstep.distill.generation import Generated, Noisy
from slimstep.distill.teaching import squared_error
from slimstep.models.noise_schedule import Level, add_noise, each, pred_of, snr, target_of

LEAST_SHARE = 1e-3  # of the noise at a time, that is new


@dataclass(eq=False)
class TrajectoryMatching(DistributionMatching):
    """Distribution matching in which a step of the student is compared with the teacher where it lands, with more
    noise, at the times between its end and its start alone; `DistributionMatching` compares what every step sees of
    the end, at all times. Of a student of one step both are the same.

    What the fake score learns at a time is the distribution of the one step whose time that is, so the steps do not
    mix, and none has to make an image at once. It has no discriminator: where a step lands is no image.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adversarial_weight:
            what = f"objective.adversarial_weight={self.adversarial_weight:g}: a step of TDM lands on no image"
            raise ValueError(f"{what}; set 0, or take objective=dmd")
        self.shares_N2 = self.schedule.share_at(self.generation.bounds_N2).tolist()

    def renoised(self, generated: Generated, generator: torch.Generator) -> Noisy:
        """Where the samples' last step lands, with new noise up to a uniform time within that step."""
        draw: dict[str, Any] = {"generator": generator, "device": generated.x0.device}
        (start, end), (lowest, highest) = self.shares_N2[generated.step], self.time_range
        low = max(end, lowest)
        high = max(low, min(start, highest))
        t_B = self.schedule.time_at(low + (high - low) * torch.rand(len(generated.x0), **draw))
        level, noise = self.schedule.alpha_sigma(t_B), torch.randn(generated.x0.shape, **draw)
        kept_B, new_B = noise_between(self.landing(generated), level)
        z = add_noise(self.landed(generated), noise, (kept_B, new_B))
        return Noisy(z, noise, t_B, level, generated.cond)

    def landing(self, generated: Generated) -> Level:
        """The level at which the samples' last step lands; where new noise is added to what it sees, the sample's."""
        end = self.generation.bounds_N2[-1 if self.generation.renoises else generated.step, 1]
        return self.schedule.alpha_sigma(end.expand(len(generated.x0)))

    def landed(self, generated: Generated) -> Tensor:
        """Where the samples' last step lands, without a gradient."""
        if self.generation.renoises:
            return generated.x0.detach()
        x0, start = generated.x0.detach(), self.generation.bounds_N2[generated.step, 0]
        level = self.schedule.alpha_sigma(start.expand(len(x0)))
        return add_noise(x0, pred_of(x0, generated.z, level, "epsilon"), self.landing(generated))

    def denoising(self, fake_score: nn.Module, generated: Generated, noisy: Noisy) -> Tensor:
        """The loss whose minimum is the score of the samples that landed: of the noise of its time σ it says σ/s ε, s ε
        being what was added.

        The less was added, and the noisier the landing, the more the target varies about that, without bound: each
        sample is weighted by the inverse of this variance, which makes all steps weigh as the last one does.
        """
        pred = self.generation.predict(fake_score, noisy.z, noisy.t_B, noisy.cond)
        landing = self.landing(generated)
        (alpha_B, sigma_B), (_, new_B) = noisy.level, noise_between(landing, noisy.level)
        noise = each(sigma_B / new_B, noisy.noise) * noisy.noise
        x0 = (noisy.z - each(sigma_B, noise) * noise) / each(alpha_B, noise)
        target = target_of(x0, noise, noisy.level, self.schedule.prediction_type)
        weight_B = (new_B / sigma_B) ** 2 / (1 + 1 / snr(landing)) ** 2
        return (weight_B * squared_error(pred, target)).mean()


def noise_between(here: Level, there: Level) -> tuple[Tensor, Tensor]:
    """(a, s) of z_there = a z_here + s ε, which has the level `there`."""
    (alpha_B, sigma_B), (to_alpha_B, to_sigma_B) = here, there
    kept_B = to_alpha_B / alpha_B
    variance_B = to_sigma_B**2 - (kept_B * sigma_B) ** 2
    return kept_B, variance_B.clamp(min=(LEAST_SHARE * to_sigma_B) ** 2).sqrt()
