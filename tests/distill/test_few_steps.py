"""The laws of what is distilled into few steps at once: distribution matching and adversarial distillation."""

import copy
import itertools
from dataclasses import replace
from itertools import count

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import LCMScheduler
from torch import nn
from torch.utils.data import StackDataset

from slimstep.distill.adversarial import AdversarialDistillation
from slimstep.distill.discriminator import AdversarialLoss, Discriminator
from slimstep.distill.dmd import DistributionMatching
from slimstep.distill.generation import Generated, Generation, Noisy, renoised
from slimstep.distill.scm import ContinuousConsistency, along, cos_sin, size
from slimstep.distill.teaching import StepSchedule
from slimstep.engine.config import TrainConfig
from slimstep.engine.loop import train
from slimstep.engine.objective import STUDENT, as_objective
from slimstep.engine.run import Run
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import takes_guidance
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.family import denoiser_of, schedule_for
from slimstep.models.flow import eulers, set_steps, stretched
from slimstep.models.noise_schedule import schedule_of
from slimstep.models.sizes import set_resolution
from tests.distill.test_teaching import scheduler
from tests.models.conftest import small_stock_unet
from tests.models.families.small import PIPELINES, PRUNABLE, STOCK
from tests.tiny import slow


class Killed(Exception):
    pass


class World:
    """A small network with its schedule, and the grid of a student of so many steps."""

    def __init__(self, kind: str, steps: int = 4):
        if kind == "UNet":
            self.teacher = PrunableUNet2DConditionModel.from_unet(small_stock_unet())
            self.scheduler, self.schedule = scheduler(), schedule_of(scheduler())
        else:
            self.teacher, pipeline = PRUNABLE[kind].from_unet(STOCK[kind]()), PIPELINES[kind]()
            pipeline.register_modules(transformer=self.teacher, scheduler=eulers(pipeline.scheduler))
            set_resolution(pipeline, 16)
            self.schedule = schedule_for(pipeline)
            self.scheduler = stretched(pipeline.scheduler, steps, self.schedule.steps)
        self.teacher.requires_grad_(False).eval()
        self.denoiser = denoiser_of(self.teacher, self.schedule.prediction_type)
        latents, _, cond = self.denoiser.example(self.teacher, 6, tokens=7, generator=torch.Generator().manual_seed(0))
        self.batch = {"latents": latents, **cond.tensors, "progress": 0.0, "nth": 0}
        self.uncond = cond.rows([0]).map(torch.zeros_like)
        if "text_mask" in cond.tensors:
            whole = torch.ones_like(cond.tensors["text_mask"][:1])
            self.uncond = Conditioning({**self.uncond.tensors, "text_mask": whole})
        self.steps = StepSchedule(self.scheduler, 8, self.scheduler, steps)
        self.student = copy.deepcopy(self.teacher).requires_grad_()

    def objective(self, kind, **options):
        if kind is DistributionMatching:
            options = {"initial_student": lambda: self.teacher, **options}
        return kind(self.denoiser, self.schedule, self.uncond, self.teacher, self.steps, **options)

    @property
    def generation(self):
        return Generation.of(self.denoiser, self.schedule, self.steps, "cpu", 1.0)

    def generated(self):
        return Generated(self.batch["latents"], Conditioning({k: self.batch[k] for k in self.uncond.tensors}))


@pytest.fixture(scope="module", params=["UNet", "SD3", *slow("FLUX", "Sana", "Qwen-Image")])
def world(request):
    return World(request.param)


@pytest.fixture(scope="module")
def unet():
    return World("UNet")


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def test_samples_are_those_of_the_scheduler_that_the_student_is_exported_with(world):
    seed = next(s for s in count() if torch.randint(4, (), generator=draw(s)) == 3)  # one that goes to the last step
    with torch.no_grad():
        ours = world.generation(world.teacher, world.batch, world.uncond, draw(seed))
    generator = draw(seed)
    torch.randint(4, (), generator=generator)
    z = torch.randn(world.batch["latents"].shape, generator=generator)
    stock = copy.deepcopy(world.scheduler)
    set_steps(stock, 4, getattr(world.schedule, "steps", None))
    for t in stock.timesteps:
        with torch.no_grad():
            pred = world.generation.predict(world.teacher, z, t.expand(len(z)), ours.cond)
        z = stock.step(pred, t, z, return_dict=False)[0]
    torch.testing.assert_close(ours.x0, z, rtol=1e-4, atol=1e-4)


def test_a_student_of_lcms_scheduler_is_trained_where_that_takes_it(unet):
    """Its grid is that of the student's steps, and the noise between them is new: two steps with the same draws."""
    kind = LCMScheduler.from_config(unet.scheduler.config, original_inference_steps=2)
    steps = StepSchedule(unet.scheduler, 8, kind, 2)
    generation = Generation.of(unet.denoiser, unet.schedule, steps, "cpu", 1.0)
    seed = next(s for s in count() if torch.randint(2, (), generator=draw(s)) == 1)
    with torch.no_grad():
        ours = generation(unet.teacher, unet.batch, unet.uncond, draw(seed))
    generator = draw(seed)
    torch.randint(2, (), generator=generator)
    z = torch.randn(unet.batch["latents"].shape, generator=generator)
    kind.set_timesteps(2)
    assert kind.timesteps.tolist() == [999, 499] == generation.bounds_N2[:, 0].tolist()
    for t in kind.timesteps:
        with torch.no_grad():
            pred = generation.predict(unet.teacher, z, t.expand(len(z)), ours.cond)
        z = kind.step(pred, t, z, generator=generator, return_dict=False)[0]
    torch.testing.assert_close(ours.x0, z, rtol=1e-4, atol=1e-4)  # LCM's boundary condition is 1e-8 from x̂ here


def test_all_steps_of_the_student_are_trained_equally_often(unet):
    times = [unet.schedule.grid(unet.scheduler, 4)[:, 0].tolist().index(t) for t in stops(unet, 200)]
    assert set(times) == {0, 1, 2, 3} and min(times.count(k) for k in range(4)) > 30


def stops(world, draws):
    """The time of the last evaluation of each of so many samples."""
    seen = []

    class Watching:
        prediction_type = "v_prediction"

        def __call__(self, network, z, t_B, cond, guidance_B=None):
            seen.append(int(t_B[0]))
            return z

    generation, ends = replace(world.generation, denoiser=Watching()), []
    for seed in range(draws):
        generation(world.teacher, world.batch, world.uncond, draw(seed))
        ends.append(seen[-1])
    return ends


def test_a_student_whose_images_the_teacher_finds_as_likely_as_the_fake_score_goes_nowhere(world):
    objective = world.objective(DistributionMatching, guidance_scale=1.0)
    networks = {STUDENT: world.student, **objective.networks}
    loss, metrics = objective.loss(networks, world.batch, draw(), STUDENT)
    assert loss.item() < 1e-9 and metrics["direction"].item() < 1e-4
    guided = world.objective(DistributionMatching, guidance_scale=3.0)
    _, metrics = guided.loss({STUDENT: world.student, **guided.networks}, world.batch, draw(), STUDENT)
    assert (metrics["direction"].item() > 1e-4) != takes_guidance(world.teacher)  # which guides the fake score alike


class Gaussian:
    """Denoisers of normal distributions, x̂ = E[x | z], whose "network" is (mean, standard deviation)."""

    prediction_type = "sample"

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, network, z, t_B, cond, guidance_B=None):
        (mean, std), (alpha_B, sigma_B) = network, self.schedule.alpha_sigma(t_B)
        alpha, sigma = (x_B.view(-1, 1) for x_B in (alpha_B, sigma_B))
        return mean + alpha * std**2 * (z - alpha * mean) / (alpha**2 * std**2 + sigma**2)


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
        generated = Generated(x0, Conditioning())
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


@pytest.mark.parametrize("range_", [(0.0, 0.5), (0.6, 0.5), (0.5, 1.0)])
def test_times_where_nothing_can_be_compared_are_refused(unet, range_):
    for kind in (DistributionMatching, AdversarialDistillation):
        with pytest.raises(ValueError, match="objective.time_range=.* two shares, 0 < low < high < 1"):
            unet.objective(kind, time_range=range_)


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


class Exact(Gaussian):
    """Of a normal distribution around 0: the teacher gives E[x | z], the student where the ODE from z ends."""

    def __call__(self, network, z, t_B, cond, guidance_B=None):
        if network == "teacher":
            return super().__call__((0.0, 0.5), z, t_B, cond)
        cos, sin = (x_B.view(-1, 1) for x_B in cos_sin(self.schedule.alpha_sigma(t_B)))
        size_B = size(self.schedule.alpha_sigma(t_B))
        return z / size_B[:, None] * 0.5 / (0.25 * cos**2 + sin**2).sqrt()


@pytest.mark.parametrize("kind", ["UNet", "SD3"])
def test_the_solution_of_the_ode_is_where_continuous_consistency_rests(kind, monkeypatch):
    monkeypatch.setattr("slimstep.distill.generation.takes_guidance", lambda network: False)
    world = World(kind)
    objective = world.objective(ContinuousConsistency, guidance_scale=1.0, start_share=0.0, time_range=(0.1, 0.9))
    schedule = replace(world.schedule, prediction_type="sample")
    denoiser = Exact(schedule)
    objective.schedule, objective.teacher = schedule, "teacher"
    objective.generation = replace(objective.generation, denoiser=denoiser, schedule=schedule)
    objective.uncond = Conditioning()
    t_B, before_B = objective.times(512, draw())
    z, level = torch.randn(512, 1, generator=draw(1)), schedule.alpha_sigma(t_B)
    noisy = Noisy(z, z, t_B, level, Conditioning())
    F, path = (objective.velocity(network, noisy) for network in ("student", "teacher"))
    slope = objective.difference("student", noisy, F, path, before_B)
    cos, sin = (x_B[:, None] for x_B in cos_sin(level))
    g = -(cos**2) * (F - path) - cos * sin * (along(noisy) + slope)
    assert (F - path).abs().mean() > 0.1  # the teacher's single step is elsewhere
    assert g.abs().mean() < 0.02
    moved = objective.direction(F, path, slope, noisy, progress=0.0)
    assert moved.abs().mean() > 0.1 and moved.square().mean(1).max() <= 1  # without the tangent: the teacher's step


def test_a_difference_over_a_short_time_is_the_jvp():
    """In float64, and at times that are no whole timesteps: what a network makes of a time turns within few of them."""
    world = World("SD3")
    objective = world.objective(ContinuousConsistency, step=1e-6, start_share=0.0, time_range=(0.3, 0.9))
    teacher, latents = copy.deepcopy(world.teacher).double(), world.batch["latents"].double()
    t_B, before_B = (t_B.double() for t_B in objective.times(6, draw()))
    before_B = t_B - (t_B - before_B).clamp(min=1e-2)
    cond, uncond = (c.to(dtype=torch.float64) for c in (world.generated().cond, world.uncond))
    noisy = Noisy(latents, latents, t_B, world.schedule.alpha_sigma(t_B), cond)
    with torch.no_grad():
        F, path = objective.velocity(teacher, noisy), objective.velocity(teacher, noisy, uncond)
        short, exact = (way(teacher, noisy, F, path, before_B) for way in (objective.difference, objective.jvp))
    assert (short - exact).square().mean() < 1e-3 * exact.square().mean()


@pytest.mark.parametrize("tangent", ["difference", "jvp"])
def test_a_consistent_student_is_trained_where_its_steps_start(unet, tangent):
    objective = unet.objective(ContinuousConsistency, tangent=tangent, tangent_warmup=0.0, start_share=1.0)
    t_B, before_B = objective.times(64, draw())
    assert set(t_B.tolist()) == set(unet.schedule.grid(unet.scheduler, 4)[:, 0].tolist())
    assert (before_B < t_B).all() and (before_B >= 0).all()
    loss, _ = objective(unet.student, unet.batch, draw())
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in unet.student.parameters())
    unet.student.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DistributionMatching, {}),
        (DistributionMatching, {"fresh_samples": True, "fake_updates": 2}),
        (DistributionMatching, {"adversarial_weight": 0.1, "teacher_mix": 0.5}),
        (AdversarialDistillation, {}),
        (AdversarialDistillation, {"distillation_weight": 0.0, "discriminator_updates": 2}),
        (ContinuousConsistency, {}),
    ],
)
def test_the_cost_that_is_planned_is_the_rows_that_are_run(unet, kind, options):
    """In the mean over the stops of a student of one step, which has one; guided rows count once."""
    world = World("UNet", steps=1)
    objective, rows = world.objective(kind, guidance_scale=1.0, **options), {True: 0, False: 0}

    class Counting:
        prediction_type, sample_shape = "v_prediction", (4, 8, 8)
        example = world.denoiser.example

        def __call__(self, network, x, *args, **kwargs):
            rows[torch.is_grad_enabled()] += len(x)
            return world.denoiser(network, x, *args, **kwargs)

    objective.generation = replace(objective.generation, denoiser=Counting())
    if hasattr(objective, "adversarial"):
        objective.adversarial = replace(objective.adversarial, generation=objective.generation)
    objective = as_objective(objective)
    networks = {STUDENT: world.student, **objective.networks}
    rows.update({True: 0, False: 0})
    for nth, update in enumerate(objective.updates(0)):
        for name, network in networks.items():
            network.requires_grad_(name == update)
        objective.loss(networks, {**world.batch, "nth": nth}, draw(nth), update)
    cost = getattr(objective, "cost", None) or objective.call.cost
    assert rows == {True: 6 * cost.trained_rows, False: 6 * cost.rows}


def test_a_network_beside_the_student_is_in_the_plan(unet):
    weights = sum(p.numel() for p in unet.teacher.parameters())
    assert unet.objective(DistributionMatching).cost.beside == weights
    assert unet.objective(DistributionMatching, fake_lora_rank=4).cost.beside == 0
    assert unet.objective(AdversarialDistillation).cost.beside == 0
