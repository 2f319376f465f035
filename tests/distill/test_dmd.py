"""The laws of distribution matching."""

import copy
import itertools
from dataclasses import replace
from itertools import count

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import StackDataset

from slimstep.distill.dmd import DistributionMatching
from slimstep.distill.generation import Generated, renoised
from slimstep.engine.config import TrainConfig
from slimstep.engine.loop import train
from slimstep.engine.objective import STUDENT
from slimstep.engine.run import Run
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import takes_guidance
from tests.distill.few_steps import Gaussian, draw
from tests.engine.test_loop import Killed


def test_a_student_whose_images_the_teacher_finds_as_likely_as_the_fake_score_goes_nowhere(world):
    objective = world.objective(DistributionMatching, guidance_scale=1.0)
    networks = {STUDENT: world.student, **objective.networks}
    loss, metrics = objective.loss(networks, world.batch, draw(), STUDENT)
    assert loss.item() < 1e-9 and metrics["direction"].item() < 1e-4
    guided = world.objective(DistributionMatching, guidance_scale=3.0)
    _, metrics = guided.loss({STUDENT: world.student, **guided.networks}, world.batch, draw(), STUDENT)
    assert (metrics["direction"].item() > 1e-4) != takes_guidance(world.teacher)  # which guides the fake score alike


def test_matching_ends_at_the_teachers_distribution_from_a_student_elsewhere(unet, monkeypatch):
    """Where both scores are exact, the student's mean and standard deviation become the teacher's."""
    monkeypatch.setattr("slimstep.distill.generation.takes_guidance", lambda network: False)
    schedule = replace(unet.schedule, prediction_type="sample")
    objective = unet.objective(DistributionMatching, guidance_scale=1.0)
    teacher = torch.tensor(2.0), torch.tensor(0.5)
    objective.schedule, objective.teacher = schedule, teacher
    objective.generation = replace(objective.generation, denoiser=Gaussian(schedule), schedule=schedule)
    mean, std = torch.zeros((), requires_grad=True), torch.ones((), requires_grad=True)
    optimizer = torch.optim.Adam([mean, std], 0.03)
    for step in range(400):
        x0 = mean + std * torch.randn(512, 1, generator=draw(step))
        generated = Generated(x0, Conditioning(), x0, 3)
        noisy = renoised(generated, schedule, objective.time_range, draw(step + 10_000))
        loss, _ = objective.matching((mean.detach(), std.detach()), generated, noisy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mean.item() == pytest.approx(2.0, abs=0.1) and std.abs().item() == pytest.approx(0.5, abs=0.1)


def test_the_fake_score_learns_of_the_students_samples_alone_and_gives_the_student_no_gradient(unet):
    objective = unet.objective(DistributionMatching)
    networks = {STUDENT: unet.student, **objective.networks}
    other = {**unet.batch, "latents": unet.batch["latents"] * 100}
    (loss, _), (again, _) = (objective.loss(networks, batch, draw(), "fake_score") for batch in (unet.batch, other))
    assert torch.equal(loss, again)
    loss.backward()
    assert all(p.grad is None for p in unet.student.parameters())
    assert all(p.grad is not None for n, p in networks["fake_score"].named_parameters())


@pytest.mark.parametrize("fresh", [False, True])
def test_the_fake_scores_updates_of_a_step_see_the_same_samples_and_a_new_step_new_ones(unet, fresh):
    """With two micro-batches to an update, too: each comes back in its turn."""
    objective, seen = unet.objective(DistributionMatching, fresh_samples=fresh), []
    networks = {STUDENT: unet.student, **objective.networks}

    def denoising(fake_score, generated, noisy):
        seen.append((generated.x0, noisy.z))
        return noisy.z.mean()

    objective.denoising = denoising
    for step in range(2):
        for nth, micro in itertools.product(range(3), range(2)):
            generator = draw(100 * step + 10 * nth + micro)
            objective.loss(networks, {**unet.batch, "nth": nth}, generator, "fake_score")
        objective.loss(networks, {**unet.batch, "nth": 3}, draw(step), STUDENT)
    x0, z = zip(*seen, strict=True)
    assert torch.equal(x0[0], x0[2]) == torch.equal(x0[1], x0[5]) == (not fresh)
    assert not torch.equal(x0[0], x0[1]) and not torch.equal(z[0], z[2]) and not torch.equal(x0[6], x0[0])


def test_a_low_rank_fake_score_is_the_teachers_memory_and_its_answers(unet):
    objective = unet.objective(DistributionMatching, fake_lora_rank=2)
    fake, owned = objective.networks["fake_score"], {p.data_ptr() for p in unet.teacher.parameters()}
    new = [p for p in fake.parameters() if p.data_ptr() not in owned]
    assert new and all(p.requires_grad for p in new)
    assert not any(p.requires_grad for p in fake.parameters() if p.data_ptr() in owned)
    assert sum(p.numel() for p in new) < 0.5 * sum(p.numel() for p in unet.teacher.parameters())
    noisy = renoised(unet.generated(), unet.schedule, (0.02, 0.98), draw())
    with torch.no_grad():
        both = [objective.generation.x0(network, noisy) for network in (unet.teacher, fake)]
    assert torch.equal(*both)
    assert not any(hasattr(module, "lora_A") for module in unet.teacher.modules())


def test_a_low_rank_fake_score_of_a_half_precision_teacher_is_trained_in_float32(unet):
    """An optimizer's small steps would be lost in half precision, and fp16's scaler refuses it."""
    half = copy.copy(unet)
    half.teacher = copy.deepcopy(unet.teacher).to(torch.bfloat16)
    fake = half.objective(DistributionMatching, fake_lora_rank=2).networks["fake_score"]
    assert {p.dtype for p in fake.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in fake.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_mixed_teacher_lies_between_the_two(unet):
    other = copy.deepcopy(unet.teacher)
    for parameter in other.parameters():
        parameter.mul_(1.1)
    noisy = renoised(unet.generated(), unet.schedule, (0.02, 0.98), draw())
    with torch.no_grad():
        first, mixed, second = (
            unet.objective(DistributionMatching, teacher_mix=mix, initial_student=lambda: other).real(noisy)
            for mix in (0.0, 0.25, 1.0)
        )
    assert not torch.equal(first, second)
    torch.testing.assert_close(mixed, 0.75 * first + 0.25 * second)


CONFIG = TrainConfig(steps=3, batch_size=2, checkpoint_every=1, log_every=1, learning_rate=1e-3, warmup_steps=1)


def trained_by(path, world, objective, config=CONFIG):
    AcceleratorState._reset_state(True)
    accelerator, student = Accelerator(cpu=True), copy.deepcopy(world.student)
    samples = StackDataset(**{key: value for key, value in world.batch.items() if torch.is_tensor(value)})
    try:
        return train(student, objective, samples, config, Run(path, accelerator, seed=3), "stage").state_dict()
    finally:
        accelerator.free_memory()


def test_the_fake_score_saves_memory_as_the_student_does(tmp_path, unet):
    """Gradient checkpointing and the memory format are for both, and change no result."""
    config = replace(CONFIG, steps=1, gradient_checkpointing=True)
    objectives = [unet.objective(DistributionMatching, fake_updates=1, adversarial_weight=0.1) for _ in range(2)]
    saving = trained_by(tmp_path / "saving", unet, objectives[0], config)
    plain = trained_by(tmp_path / "plain", unet, objectives[1], replace(CONFIG, steps=1))
    fake = [objective.networks["fake_score"] for objective in objectives]
    assert [network.is_gradient_checkpointing for network in fake] == [True, False]
    for name, value in saving.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"adversarial_weight": 0.1}, {}, {"fake_lora_rank": 2}], ids=["discriminator", "plain", "low rank"]
)
def test_a_killed_distribution_matching_ends_with_the_bits_of_a_quiet_one(tmp_path, unet, options):
    def objective(dies_at=0):
        made, calls = unet.objective(DistributionMatching, fake_updates=2, **options), count(1)
        loss = made.loss

        def mortal(*args):
            if next(calls) == dies_at:
                raise Killed
            return loss(*args)

        made.loss = mortal
        return made

    quiet = trained_by(tmp_path / "quiet", unet, objective())
    for call in (3, 7):  # in the first step, and after a checkpoint
        with pytest.raises(Killed):
            trained_by(tmp_path / "killed", unet, objective(call))
    continued = trained_by(tmp_path / "killed", unet, objective())
    assert all(torch.equal(quiet[name], continued[name]) for name in quiet)
    assert (tmp_path / "quiet/metrics.jsonl").read_text() == (tmp_path / "killed/metrics.jsonl").read_text()
