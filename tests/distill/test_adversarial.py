"""The laws of adversarial distillation."""

import copy

import pytest
import torch
from torch import nn

from slimstep.distill.adversarial import AdversarialDistillation
from slimstep.distill.discriminator import AdversarialLoss, Discriminator
from slimstep.distill.generation import renoised
from slimstep.engine.objective import STUDENT
from tests.distill.few_steps import draw


def test_a_discriminator_without_an_opinion_loses_two_and_one_that_is_sure_nothing(unet):
    objective = unet.objective(AdversarialDistillation, r1_weight=0.0)
    loss = objective.adversarial

    class Fixed(nn.Module):
        def forward(self, features):
            sign = torch.cat([torch.ones(6), -torch.ones(6)])[:, None] if self.sure else torch.zeros(12, 1)
            return [2 * sign for _ in features]

    discriminator = Fixed()
    for discriminator.sure, expected in ((False, 2.0), (True, 0.0)):
        value, metrics = loss.of_discriminator(discriminator, unet.generated(), unet.batch, draw())
        assert value.item() == expected
    assert metrics["real"] == metrics["generated"] == 1


def test_r1_is_the_slope_on_real_features(unet):
    """Of a linear head the slope is its weight, wherever it is looked at."""
    loss = AdversarialLoss(unet.generation, unet.teacher, (0.02, 0.98), r1_weight=1.0)

    class Linear(nn.Module):
        def forward(self, features):
            return [3 * f_BCP.sum(1) for f_BCP in features]

    _, metrics = loss.of_discriminator(Linear(), unet.generated(), unet.batch, draw())
    with torch.no_grad():
        features = loss.features(renoised(unet.generated(), unet.schedule, (0.02, 0.98), draw()))
    assert metrics["r1"].item() == pytest.approx(9 * sum(f[0].numel() for f in features) / len(features))


def test_the_discriminators_opinion_reaches_the_student_through_a_teacher_that_stays(world):
    objective = world.objective(AdversarialDistillation, distillation_weight=0.0)
    networks = {STUDENT: world.student, **objective.networks}
    assert isinstance(networks["discriminator"], Discriminator) and len(networks["discriminator"].heads) == 3
    before = copy.deepcopy(world.teacher.state_dict())
    loss, _ = objective.loss(networks, world.batch, draw(), STUDENT)
    gradients = torch.autograd.grad(loss, list(world.student.parameters()), allow_unused=True)
    assert sum(g.abs().sum().item() for g in gradients if g is not None) > 0
    assert all(torch.equal(before[name], value) for name, value in world.teacher.state_dict().items())
    assert all(p.grad is None for p in world.teacher.parameters())
