"""What is not used lies on the CPU: text encoders but while they encode, teachers whose targets are cached."""

import copy
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler

from scripts.random_transformers import small_flux_pipeline, small_pixart_pipeline
from slimstep.distill.teaching import StepSchedule
from slimstep.engine.config import TrainConfig
from slimstep.engine.run import Run
from slimstep.eval import training
from slimstep.eval.inputs import Teacher
from slimstep.eval.sampling import Sampler
from slimstep.models.families.transformer.networks.flux import PrunableFluxTransformer2DModel
from slimstep.models.families.transformer.networks.pixart import PrunablePixArtTransformer2DModel
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.networks import network_of, text_encoders, with_unet
from slimstep.models.pipeline import to_device
from slimstep.models.sizes import settle_sizes
from tests.tiny import no_caption, small_pipeline

PIPELINES = {
    "SD": (small_pipeline, PrunableUNet2DConditionModel),
    "FLUX": (small_flux_pipeline, PrunableFluxTransformer2DModel),
    "PixArt": (small_pixart_pipeline, PrunablePixArtTransformer2DModel),
}
PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2")


def prunable_pipeline(name: str):
    make, kind = PIPELINES[name]
    pipeline = make()
    made = with_unet(pipeline, kind.from_unet(network_of(pipeline)).requires_grad_(False))
    settle_sizes(made)
    return to_device(made, "cuda")


def places(pipeline) -> dict[str, str]:
    parts = {name: getattr(pipeline, name, None) for name in PARTS}
    return {name: next(part.parameters()).device.type for name, part in parts.items() if part is not None}


def at_rest(pipeline) -> dict[str, str]:
    return {name: "cpu" if name in text_encoders(pipeline) else "cuda" for name in places(pipeline)}


@pytest.mark.parametrize("name", PIPELINES)
def test_text_encoders_are_on_the_device_only_while_prompts_are_encoded(gpu, name):
    pipeline, seen = prunable_pipeline(name), {"encoding": [], "drawing": []}
    assert places(pipeline) == at_rest(pipeline)
    for encoder in text_encoders(pipeline).values():
        encoder.register_forward_pre_hook(lambda *_: seen["encoding"].append(places(pipeline)))
    network_of(pipeline).register_forward_pre_hook(lambda *_: seen["drawing"].append(places(pipeline)))
    images = Sampler(pipeline, 2, 1.0).images(network_of(pipeline), ["a", "b"], [0, 1])
    assert images.device.type == "cuda"
    assert seen["encoding"] and all(set(at.values()) == {"cuda"} for at in seen["encoding"])
    assert seen["drawing"] and all(at == at_rest(pipeline) for at in [*seen["drawing"], places(pipeline)])


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("cached_draws", [0, 2])
def test_training_leaves_the_device_to_what_it_uses(gpu, tmp_path, monkeypatch, cached_draws, precision):
    AcceleratorState._reset_state(True)
    run, pipeline, seen = Run(tmp_path, Accelerator(mixed_precision=precision), seed=0), prunable_pipeline("SD"), {}
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False,
                              timestep_spacing="trailing", rescale_betas_zero_snr=True)  # fmt: skip
    pipeline.scheduler = scheduler
    student, copied = copy.deepcopy(pipeline.unet).to("cpu"), []

    def deepcopy(network):
        copied.append({places(pipeline)["unet"], student.device.type})
        return copy.deepcopy(network)

    monkeypatch.setattr(training, "copy", SimpleNamespace(deepcopy=deepcopy))

    def train(unet, objective, *_):
        seen.update(places(pipeline), teacher=objective.teacher.device.type, student=unet.device.type)
        seen["same"] = objective.teacher is pipeline.unet
        return unet

    monkeypatch.setattr(training, "train", train)
    steps = "slimstep.distill.steps.StepDistillation"
    training.train_stage(
        student, "stage", {"_target_": steps, "guided_share": 0.0, "cached_draws": cached_draws}, TrainConfig(),
        Teacher(pipeline, None, run), lambda: SimpleNamespace(unconditional=no_caption()),
        [pipeline.unet, pipeline.vae, pipeline.text_encoder], step_schedule=StepSchedule(scheduler, 4, scheduler, 2),
    )  # fmt: skip
    AcceleratorState._reset_state(True)
    assert copied == [{"cpu"}] * (precision == "bf16"), "while a network is copied the device has neither"
    assert seen.pop("same") == (precision == "no")
    where = "cpu" if cached_draws else "cuda"
    own = where if precision == "no" else "cpu"
    assert seen == {"unet": own, "vae": "cpu", "text_encoder": "cpu", "teacher": where, "student": "cuda"}
    assert places(pipeline) == at_rest(pipeline)
