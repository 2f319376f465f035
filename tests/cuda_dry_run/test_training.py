"""The training loop on a device that is not there: every objective, every precision, no wait per step."""

from itertools import product

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler
from torch.utils.data import StackDataset

from slimstep.distill.adversarial import AdversarialDistillation
from slimstep.distill.consistency import ConsistencyDistillation
from slimstep.distill.decoder import DecoderDistillation
from slimstep.distill.dmd import DistributionMatching
from slimstep.distill.generation import SPREAD
from slimstep.distill.guidance import GuidanceDistillation
from slimstep.distill.prediction import Denoising
from slimstep.distill.recovery import Recovery
from slimstep.distill.scm import ContinuousConsistency
from slimstep.distill.steps import StepDistillation
from slimstep.distill.tdm import TrajectoryMatching
from slimstep.distill.teaching import StepSchedule
from slimstep.engine.config import TrainConfig
from slimstep.engine.loop import train
from slimstep.engine.objective import requirements
from slimstep.engine.run import Run
from slimstep.models.decoding import ImageDecoder
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.guidance import with_guidance_embedding
from slimstep.models.noise_schedule import schedule_of
from slimstep.prune.stochastic_depth import StochasticDepth
from tests.engine.two_networks import FakeScore, network
from tests.tiny import DENOISER, WIDTH, no_caption, small_pipeline

SKIPS = {"resnet": 0.2, "attention": 0.2}
OBJECTIVES = {
    "stochastic depth": (StochasticDepth, {"skip_prob": SKIPS}),
    "stochastic depth, ramp of time, teacher": (
        StochasticDepth, {"skip_prob": SKIPS, "ramp": "time", "teacher_weight": 0.5}
    ),
    "recovery": (Recovery, {}),
    "denoising": (Denoising, {}),
    "steps": (StepDistillation, {"guided_share": 0.5}),
    "guidance": (GuidanceDistillation, {}),
    "lcm": (ConsistencyDistillation, {}),
    "dmd": (DistributionMatching, {}),
    "dmd, discriminator": (DistributionMatching, {"adversarial_weight": 0.1}),
    "dmd, low rank, mixed": (DistributionMatching, {"fake_lora_rank": 2, "teacher_mix": 0.5}),
    "tdm": (TrajectoryMatching, {}),
    "adversarial": (AdversarialDistillation, {}),
    "scm": (ContinuousConsistency, {}),
    "scm, jvp": (ContinuousConsistency, {"tangent": "jvp"}),
    "decoder": (DecoderDistillation, {"l1": 1.0, "gradient": 1.0}),
    "two networks": (FakeScore, {}),
}
GUIDED = ("guidance", "lcm")
UPDATES = {"two networks": 3, "dmd": 3, "dmd, discriminator": 4, "dmd, low rank, mixed": 3, "tdm": 3, "adversarial": 2}
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def subject(name, precision):
    """A student on the CPU, as a job makes it, and its objective with a teacher in the precision's dtype."""
    kind, options = OBJECTIVES[name]
    if name == "two networks":
        return network(seed=0), kind(**options)
    pipeline = small_pipeline()
    if name == "decoder":
        wide = ImageDecoder(pipeline.vae.requires_grad_(False)).to("cuda")
        return ImageDecoder(small_pipeline().vae), kind(wide, **options)
    student = PrunableUNet2DConditionModel.from_unet(pipeline.unet).requires_grad_()
    if name in GUIDED:
        student = with_guidance_embedding(student, 8).requires_grad_()
    teacher = PrunableUNet2DConditionModel.from_unet(pipeline.unet).to("cuda", DTYPES[precision]).requires_grad_(False)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False,
                              timestep_spacing="trailing", rescale_betas_zero_snr=True)  # fmt: skip
    given = [DENOISER, schedule_of(scheduler, "cuda"), no_caption().to("cuda"), teacher]
    if requirements(kind).distils_steps:
        given.append(StepSchedule(scheduler, 4, scheduler, 2))
    if requirements(kind).initial_student:
        given.append(lambda: teacher)
    return student, kind(*given, **options)


def trained(path, name, precision, steps, **options):
    AcceleratorState._reset_state(True)
    run = Run(path, Accelerator(mixed_precision=precision), seed=0)
    assert run.accelerator.device.type == "cuda"
    student, objective = subject(name, precision)
    samples = StackDataset(latents=torch.randn(8, 4, 8, 8), text=torch.randn(8, 5, WIDTH), x=torch.randn(8, 3))
    config = TrainConfig(steps=steps, batch_size=2, log_every=100, checkpoint_every=100, **options)
    try:
        return train(student, objective, samples, config, run, "stage")
    finally:
        AcceleratorState._reset_state(True)


FAST = [("stochastic depth", "bf16"), ("dmd, low rank, mixed", "fp16"), *product(("decoder", "two networks"), DTYPES)]
UNSEEN = [("scm, jvp", "bf16"), ("scm, jvp", "fp16")]  # within jvp fakes are wrapped, and are not cast
ALL = [pytest.param(*both, marks=[] if both in FAST else pytest.mark.slow)
       for both in product(OBJECTIVES, DTYPES) if both not in UNSEEN]  # fmt: skip


@pytest.fixture(autouse=True)
def any_spread(monkeypatch):
    """Fakes are zeros, which are all alike."""
    monkeypatch.setitem(SPREAD, "spread", (-1.0, 50.0))


@pytest.mark.parametrize(("name", "precision"), ALL)
def test_every_objective_trains_in_every_precision_without_a_wait_per_step(gpu, tmp_path, name, precision):
    with gpu.counted() as one:
        trained(tmp_path / "one", name, precision, 1)
    with gpu.counted() as two:
        model = trained(tmp_path / "two", name, precision, 2)
    assert {x.device.type for x in model.parameters()} == {"cuda"}
    more = two - one
    if precision == "fp16":  # torch's own loss scaling reads at each update whether its gradient overflowed
        updates = UPDATES.get(name, 1)
        more = {wait: n for wait, n in more.items() if "number read by the host" not in wait or n > updates}
    assert not more


def test_a_wait_in_an_objective_is_found(gpu, tmp_path, monkeypatch):
    """What the test above would see."""
    plain = Denoising.__call__

    def waiting(self, *given):
        loss, metrics = plain(self, *given)
        return loss, {"wait": torch.tensor(loss.item(), device="cuda"), **metrics}

    monkeypatch.setattr(Denoising, "__call__", waiting)
    with gpu.counted() as waits:
        trained(tmp_path / "waiting", "denoising", "no", 3)
    assert any(n == 3 and "engine/loop.py" in wait for wait, n in waits.items())


@pytest.mark.slow
def test_a_compiled_training_passes_dynamo(gpu, tmp_path):
    trained(tmp_path, "denoising", "bf16", 2, compile=True)


@pytest.mark.slow
def test_a_stopped_training_goes_on_from_its_checkpoint(gpu, tmp_path):
    trained(tmp_path, "denoising", "bf16", 1, ema_decay=0.9, accumulation=2, gradient_checkpointing=True)
    (tmp_path / "stage/weights.safetensors").unlink()
    trained(tmp_path, "denoising", "bf16", 2, ema_decay=0.9, accumulation=2, gradient_checkpointing=True)
