"""A discriminator of noisy latents that sees what the frozen teacher computes of them (LADD, Sauer et al. 2024, arXiv
2403.12015; ADD, arXiv 2311.17042).

Axes: B batch, C channels of a feature, P its places.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from slimstep.distill.features import features_of
from slimstep.distill.generation import Generated, Generation, Noisy, renoised
from slimstep.engine.objective import Batch, Metrics
from slimstep.models.conditioning import Conditioning
from slimstep.models.noise_schedule import add_noise

DISCRIMINATOR = "discriminator"
HIDDEN = 128


class Discriminator(nn.Module):
    """A head for every feature: whether what it is of is real, at each place."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, c), nn.Conv1d(c, HIDDEN, 1), nn.LeakyReLU(0.2), nn.Conv1d(HIDDEN, 1, 1))
            for c in channels
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Logits [B, P] of each of the features [B, C, P]; above zero is real."""
        return [head(f_BCP)[:, 0] for head, f_BCP in zip(self.heads, features, strict=True)]


@dataclass(frozen=True)
class AdversarialLoss:
    """The hinge loss, with R1 on the heads' inputs (ADD, equation 3), on real and generated samples alike made noisy.

    The features are the teacher's at a half, at three quarters and at the end of its levels, or blocks.
    """

    generation: Generation
    teacher: nn.Module
    time_range: tuple[float, float]
    r1_weight: float

    def discriminator(self, seed: int) -> Discriminator:
        """A new one for this teacher's features, the same on every process."""
        x, t_B, cond = self.generation.denoiser.example(self.teacher, 1)
        with torch.no_grad():
            features = self.features(Noisy(x, x, t_B, self.generation.schedule.alpha_sigma(t_B), cond))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Discriminator([f_BCP.shape[1] for f_BCP in features]).to(x.device)

    def features(self, noisy: Noisy) -> list[Tensor]:
        """[B, C, P] each."""
        with features_of(self.teacher) as kept:
            self.generation.predict(self.teacher, noisy.z, noisy.t_B, noisy.cond)
        values = list(kept.values())
        chosen = [values[n] for n in (len(values) // 2, 3 * len(values) // 4, len(values) - 1)]
        return [(f.flatten(2) if f.ndim > 3 else f.mT).float() for f in chosen]  # of a transformer they are [B, P, C]

    def of_discriminator(
        self, discriminator: nn.Module, generated: Generated, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Metrics]:
        """Real samples above 1, generated ones below −1; the metrics are the shares it recognises."""
        noisy = renoised(generated, self.generation.schedule, self.time_range, generator)
        rows = len(noisy.z)
        real = add_noise(batch["latents"], noisy.noise, noisy.level)
        twice = Conditioning.cat(noisy.cond, noisy.cond)
        both = replace(noisy, z=torch.cat([real, noisy.z]), t_B=noisy.t_B.repeat(2), cond=twice)
        with torch.no_grad():
            features = self.features(both)
        features = [f_BCP.requires_grad_(self.r1_weight > 0) for f_BCP in features]
        logits = discriminator(features)
        hinge = mean([(1 - one[:rows]).relu().mean() + (1 + one[rows:]).relu().mean() for one in logits])
        metrics = {"real": mean([(one[:rows] > 0).float().mean() for one in logits]),
                   "generated": mean([(one[rows:] < 0).float().mean() for one in logits])}  # fmt: skip
        if not self.r1_weight:
            return hinge, metrics
        sums = [one[:rows].sum() for one in logits]
        slopes = torch.autograd.grad(sums, features, create_graph=True)
        r1 = mean([slope_BCP[:rows].square().flatten(1).sum(1).mean() for slope_BCP in slopes])
        return hinge + self.r1_weight * r1, {**metrics, "r1": r1}

    def of_student(self, discriminator: nn.Module, noisy: Noisy) -> Tensor:
        """−D of generated samples; its gradient goes through the teacher to the samples."""
        return -mean([one.mean() for one in discriminator(self.features(noisy))])


def mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()
