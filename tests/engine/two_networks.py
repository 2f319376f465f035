"""An objective that trains a second network, as small as it can be, for points of three coordinates."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from slimstep.engine.objective import STUDENT, Batch, Metrics, Requirements


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 3))


class FakeScore:
    """`fake_score` learns to denoise what the student gives, and the student to give what it denoises well.

    It steps twice before each step of the student, which pauses in every fourth step.
    """

    requires = Requirements(networks=("fake_score",))

    def __init__(self):
        self.networks = {"fake_score": network(seed=1)}

    def updates(self, step: int) -> Sequence[str]:
        return ("fake_score",) if step % 4 == 3 else ("fake_score", "fake_score", STUDENT)

    def loss(
        self, networks: Mapping[str, nn.Module], batch: Batch, generator: torch.Generator, update: str
    ) -> tuple[Tensor, Metrics]:
        noise = torch.randn(batch["x"].shape, generator=generator, device=generator.device)
        with torch.set_grad_enabled(update == STUDENT):
            fake = networks[STUDENT](batch["x"] + noise)
        error = (networks["fake_score"](fake + noise) - fake).square().mean()
        if update == STUDENT:
            return (fake - batch["x"]).square().mean() + 0.1 * error, {"noise": noise.mean()}
        return error, {"size": fake.square().mean()}
