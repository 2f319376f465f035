"""What a model is loaded with beside its name: dtype, variant, scheduler, LoRAs, VAE."""

import logging
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file

from slimstep.models.noise_schedule import schedule_of
from slimstep.models.original_layout import vae_weights
from slimstep.models.pipeline import export_pipeline, load_pipeline
from slimstep.models.schedulers import NO_SAMPLE, SHORT, scheduler_class, swapped_scheduler
from tests.loras import draw_lora
from tests.models.conftest import assert_equal_weights, paint
from tests.tiny import tiny_pipeline, tiny_sdxl_pipeline

TARGETS = {"unet": ["to_q", "to_v", "conv1"], "text_encoder": ["q_proj", "fc1"], "text_encoder_2": ["v_proj"]}


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def write_lora(pipeline, folder, seed=0):
    """A LoRA of UNet and text encoders with weights that show."""
    layers = {}
    for part, targets in TARGETS.items():
        if (network := getattr(pipeline, part, None)) is None:
            continue
        weights = draw_lora(network, targets, seed=seed)
        # Diffusers reads a UNet's names by the first of them: of several kinds it would lose one.
        layers[f"{part}_lora_layers"] = weights if part == "unet" else convert_state_dict_to_diffusers(weights)
    type(pipeline).save_lora_weights(folder, **layers)
    return str(folder / "pytorch_lora_weights.safetensors")


# ---- LoRAs


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_a_fused_lora_is_the_loaded_one_at_its_scale(make, tmp_path, caplog):
    make().save_pretrained(tmp_path / "model")
    lora = write_lora(make(), tmp_path / "lora")
    with caplog.at_level(logging.INFO, "slimstep"):
        fused = load_pipeline(tmp_path / "model", loras=[{"path": lora, "scale": 0.5}])
    stock = {"StableDiffusionPipeline": StableDiffusionPipeline, "StableDiffusionXLPipeline": StableDiffusionXLPipeline}
    adapted = stock[type(fused).__name__].from_pretrained(tmp_path / "model")
    adapted.load_lora_weights(lora)
    adapted.set_progress_bar_config(disable=True)
    options = {"cross_attention_kwargs": {"scale": 0.5}}
    torch.testing.assert_close(paint(fused), paint(adapted, **options), rtol=0, atol=1e-3)
    assert not torch.allclose(paint(fused), paint(load_pipeline(tmp_path / "model")), rtol=0, atol=1e-2)
    assert fused.unet.state_dict().keys() == load_pipeline(tmp_path / "model").unet.state_dict().keys()
    encoders = 2 if make is tiny_sdxl_pipeline else 1
    taken = sum(name.endswith(tuple(TARGETS["unet"])) for name, _ in fused.unet.named_modules())
    texts = {1: 2, 2: 3}[encoders]
    assert f"times 0.5: fused into {taken} modules of the UNet and {texts} of the text encoders" in caplog.text


def test_several_loras_add_up_in_any_order_and_at_scale_zero_to_nothing(folder, tmp_path):
    loras = [{"path": write_lora(tiny_pipeline(), tmp_path / str(i), i), "scale": s} for i, s in enumerate((0.3, 0.7))]
    one, other = load_pipeline(folder, loras=loras), load_pipeline(folder, loras=loras[::-1])
    for key, weight in one.unet.state_dict().items():
        torch.testing.assert_close(weight, other.unet.state_dict()[key], rtol=0, atol=1e-5)
    assert_equal_weights(load_pipeline(folder, loras=[{**loras[0], "scale": 0}]), load_pipeline(folder))


def test_an_export_of_a_fused_teacher_holds_no_adapter(folder, tmp_path):
    fused = load_pipeline(folder, loras=[{"path": write_lora(tiny_pipeline(), tmp_path / "lora")}])
    export_pipeline(fused, tmp_path / "export")
    assert_equal_weights(load_pipeline(tmp_path / "export"), fused)


# ---- schedulers


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SHORT)
def test_another_scheduler_has_the_models_noise_schedule_and_prediction(name, prediction_type):
    own = tiny_pipeline(prediction_type).scheduler
    if prediction_type == "sample" and scheduler_class(name).__name__ in NO_SAMPLE:
        with pytest.raises(ValueError, match=f"model.scheduler={name} does not know sample prediction"):
            swapped_scheduler(own, name)
        return
    swapped = swapped_scheduler(own, name)
    ours, theirs = schedule_of(swapped), schedule_of(own)
    torch.testing.assert_close(ours.alpha_T, theirs.alpha_T)
    assert ours.prediction_type == theirs.prediction_type == prediction_type
    assert not swapped.config.get("clip_sample")


TAKEN = [(name, kind) for name in SHORT for kind in ("epsilon", "v_prediction", "sample")
         if kind != "sample" or scheduler_class(name).__name__ not in NO_SAMPLE]  # fmt: skip


@pytest.mark.parametrize(("name", "prediction_type"), TAKEN)
def test_every_scheduler_denoises_a_perfect_prediction_to_the_image(name, prediction_type):
    """The network knows x0: what it predicts is exact, so any sampler must end there, but for its last σ."""
    own = tiny_pipeline(prediction_type).scheduler
    scheduler, schedule = swapped_scheduler(own, name), schedule_of(own)
    draw = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, 4, 8, 8, generator=draw)
    scheduler.set_timesteps(20)
    z = torch.randn(1, 4, 8, 8, generator=draw) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(z, t)
        alpha, sigma = interpolated(schedule, float(t))
        eps = (seen - alpha * x0) / sigma
        pred = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[prediction_type]
        z = scheduler.step(pred, t, z, return_dict=False)[0]
    assert (z - x0).abs().mean() < 0.1, (z - x0).abs().mean()


def interpolated(schedule, t):
    """α and σ at a timestep that may lie between two, as samplers of real σ place it: log σ/α is linear there."""
    low, high = int(t), min(int(t) + 1, len(schedule) - 1)
    log_T = (schedule.sigma_T / schedule.alpha_T).log()
    ratio = torch.lerp(log_T[low], log_T[high], t - low).exp()
    return 1 / (1 + ratio**2) ** 0.5, ratio / (1 + ratio**2) ** 0.5


def test_a_loaded_model_samples_with_the_scheduler_that_is_named(folder):
    for name, kind in (("unipc", "UniPCMultistepScheduler"), ("EulerDiscreteScheduler", "EulerDiscreteScheduler")):
        assert type(load_pipeline(folder, scheduler=name).scheduler).__name__ == kind
    assert load_pipeline(folder, scheduler="dpmsolver++").scheduler.config.algorithm_type == "dpmsolver++"


# ---- dtypes and variants


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_variant_is_read_and_none_is_as_it_is_stored(pipeline, tmp_path, dtype):
    pipeline.to(dtype=getattr(torch, dtype)).save_pretrained(tmp_path / "model", variant="half")
    loaded = load_pipeline(tmp_path / "model", None, "half")
    assert_equal_weights(loaded, pipeline)
    with pytest.raises(ValueError, match="has no weights of variant=fp16: choose half"):
        load_pipeline(tmp_path / "model", variant="fp16")


def test_an_export_has_one_dtype(folder, tmp_path):
    mixed = load_pipeline(folder, "float16")
    mixed.unet.float()
    export_pipeline(mixed, tmp_path / "export")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "export")
    assert {stock.unet.dtype, stock.vae.dtype, stock.text_encoder.dtype} == {torch.float32}
    assert mixed.vae.dtype == torch.float16, "exporting changed the pipeline"
    assert paint(stock).isfinite().all()


# ---- pickles


@pytest.fixture
def pickled_folder(folder, pipeline):
    """As old folders are: the UNet in shards of pickles, VAE and text encoder as one each."""
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            stem = "pytorch_model" if part == "text_encoder" else file.stem
            torch.save(load_file(file), file.with_name(f"{stem}.bin"))
            file.unlink()
    (folder / "unet/diffusion_pytorch_model.bin").unlink()
    pipeline.unet.save_pretrained(folder / "unet", safe_serialization=False, max_shard_size="100KB")
    assert (folder / "unet/diffusion_pytorch_model.bin.index.json").is_file()
    return folder


def test_a_folder_of_pickles_is_read_only_where_that_is_allowed(pickled_folder, pipeline):
    message = r"holds only pickles in \['.*'unet'.*'\], which may run code: model.allow_pickle=true reads them"
    with pytest.raises(ValueError, match=message):
        load_pipeline(pickled_folder)
    assert_equal_weights(load_pipeline(pickled_folder, allow_pickle=True), pipeline)


def test_pickles_beside_safetensors_are_not_read(folder, pipeline):
    (folder / "unet/diffusion_pytorch_model.bin").write_text("wicked")
    for allowed in (False, True):
        assert_equal_weights(load_pipeline(folder, allow_pickle=allowed), pipeline)


# ---- another VAE


@pytest.fixture
def other_vae(pipeline):
    torch.manual_seed(5)
    return AutoencoderKL.from_config(pipeline.vae.config).eval()


def with_old_names(weights):
    """The VAE's attention as diffusers named it first, and as published files have it."""
    for name, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        weights = {key.replace(f"attentions.0.{name}.", f"attentions.0.{old}."): weights[key] for key in weights}
    return weights


def test_another_vae_comes_from_a_folder_a_pipeline_or_a_file(folder, other_vae, tmp_path):
    other_vae.save_pretrained(tmp_path / "vae")
    shutil.copytree(folder, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole/vae")
    other_vae.save_pretrained(tmp_path / "whole/vae")
    own = dict(vae_weights(other_vae))
    bare = {key.removeprefix("first_stage_model."): value.contiguous() for key, value in own.items()}
    mixed = {key.replace("mid.attn_1.q.", "mid.attn_1.to_q."): value for key, value in bare.items()}
    layouts = {"original": own, "bare": bare, "mixed": mixed, "diffusers": other_vae.state_dict()}
    for name, weights in {**layouts, "old": with_old_names(other_vae.state_dict())}.items():
        save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / f"{name}.safetensors")
    torch.save({"state_dict": bare}, tmp_path / "pickled.vae.pt")
    files = [f"{name}.safetensors" for name in (*layouts, "old")]
    for name in ("vae", "whole", *files, "pickled.vae.pt"):
        loaded = load_pipeline(folder, vae=str(tmp_path / name), allow_pickle=True)
        ours, theirs = loaded.vae.state_dict(), other_vae.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    with pytest.raises(ValueError, match=r"model.vae=.*pickled.vae.pt cannot be loaded: .*model.allow_pickle=true"):
        load_pipeline(folder, vae=str(tmp_path / "pickled.vae.pt"))


def test_a_vae_of_other_latents_is_refused(folder, other_vae, tmp_path):
    other_vae.register_to_config(scaling_factor=0.13025)
    other_vae.save_pretrained(tmp_path / "xl")
    message = "model.vae=.*xl belongs to another kind of model: its scaling_factor is 0.13025, the model's 0.18215"
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder, vae=str(tmp_path / "xl"))
