"""Single files in the original layout: the same pipeline as the folder's, and one line for what cannot be read."""

import logging
import pickle
import sys
import types

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import slimstep.models.folder
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.known import write_configuration
from slimstep.models.original_layout import clip_weights, original_weights, write_original
from slimstep.models.pickles import load_pickled
from slimstep.models.pipeline import export_pipeline, load_pipeline
from tests.models.conftest import assert_equal_weights, paint, small_kind


@pytest.fixture(scope="module")
def file(tmp_path_factory, sd15_folder):
    """The random pipeline's weights as one file."""
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save_file(original_weights(StableDiffusionPipeline.from_pretrained(sd15_folder)), path)
    return path


def test_a_single_file_paints_what_its_folder_paints(file, sd15_folder, tmp_path, capfd):
    loaded = load_pipeline(file, single_file_config=str(sd15_folder))
    assert capfd.readouterr() == ("", "")
    assert isinstance(loaded.unet, PrunableUNet2DConditionModel) and not loaded.unet.training
    folder = load_pipeline(sd15_folder)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(pipeline, part).state_dict() for pipeline in (loaded, folder))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), part
    assert torch.equal(paint(loaded), paint(folder))
    export_pipeline(loaded, tmp_path / "export")
    assert torch.equal(paint(DiffusionPipeline.from_pretrained(tmp_path / "export")), paint(folder))
    half = load_pipeline(file, "bfloat16", single_file_config=str(sd15_folder))
    assert half.unet.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16


@pytest.mark.parametrize("names", [
    {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"},
    {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_a_web_uis_names_of_the_vaes_attention_are_read(file, sd15_folder, tmp_path, names, kind):
    mixed = {}
    for key, value in load_file(file).items():
        place, _, rest = key.partition(".mid.attn_1.")
        if rest and (name := rest.split(".")[0]) in names:
            key = f"{place}.mid.attn_1.{names[name]}.{rest.split('.')[1]}"
            value = value.flatten(1) if value.ndim > 1 else value  # linear layers, no 1×1 convolutions
        mixed[key] = value.contiguous()
    web_ui = tmp_path / f"web_ui.{kind}"
    save_file(mixed, web_ui) if kind == "safetensors" else torch.save({"state_dict": mixed, "global_step": 7}, web_ui)
    loaded = load_pipeline(web_ui, allow_pickle=True, single_file_config=str(sd15_folder))
    assert torch.equal(paint(loaded), paint(load_pipeline(sd15_folder)))


def bare_text(weights):
    """With the text encoder named as transformers names it since it has given up the wrapper `text_model`."""
    return {key.replace(".transformer.text_model.", ".transformer."): weights[key].contiguous() for key in weights}


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_text_encoder_without_text_model_in_its_names_is_read(small_kinds, tmp_path, kind):
    pipeline, file = small_kind(kind), tmp_path / "bare.safetensors"
    save_file(bare_text(original_weights(pipeline)), file)
    assert not any(".text_model." in key for key in load_file(file))
    assert_equal_weights(load_pipeline(file), pipeline)


@pytest.mark.parametrize("prefix", ["cond_stage_model.transformer", "cond_stage_model.transformer.text_model"])
def test_sd2_with_a_text_encoder_under_transformers_names_is_read(small_kinds, tmp_path, prefix):
    pipeline, file = small_kind("sd21"), tmp_path / "two.safetensors"
    weights = {key: value for key, value in original_weights(pipeline).items() if "cond_stage_model." not in key}
    weights |= clip_weights(pipeline.text_encoder, prefix)
    save_file({key: value.contiguous() for key, value in weights.items()}, file)
    assert_equal_weights(load_pipeline(file), pipeline)


@pytest.mark.parametrize(("said", "prediction_type"), [("epsilon", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("key", ["modelspec.prediction_type", "modelspec.predict_key"])
def test_the_metadata_tells_what_is_predicted(small_kinds, tmp_path, key, said, prediction_type):
    pipeline, file = small_kind("sd21"), tmp_path / "two.safetensors"
    write_original(pipeline, file)
    save_file(load_file(file), file, {key: said})
    assert load_pipeline(file).scheduler.config.prediction_type == prediction_type


def test_a_checkpoint_of_pickles_is_read_only_where_that_is_allowed(file, sd15_folder, tmp_path):
    config, pickled = str(sd15_folder), tmp_path / "tiny.ckpt"
    torch.save({"state_dict": load_file(file)}, pickled)
    with pytest.raises(ValueError, match=r"tiny.ckpt' holds pickles.*model.allow_pickle=true"):
        load_pipeline(pickled, single_file_config=config)
    loaded = load_pipeline(pickled, allow_pickle=True, single_file_config=config)
    assert torch.equal(paint(loaded), paint(load_pipeline(sd15_folder)))


def test_a_file_alone_is_read_with_the_configuration_of_its_kind(small_kinds, tmp_path, caplog):
    pipeline, file = small_kind("sd15"), tmp_path / "alone.safetensors"
    write_original(pipeline, file)
    with caplog.at_level(logging.INFO, "slimstep"):
        loaded = load_pipeline(file)
    assert [record.message for record in caplog.records if "single file" in record.message] == [
        "single file: read as sd15, 512 px, predicting epsilon, by its weights"
    ]
    assert_equal_weights(loaded, pipeline)
    pipeline.register_modules(scheduler=loaded.scheduler)
    size = {"height": 64, "width": 64}
    assert torch.equal(paint(loaded, **size), paint(pipeline, **size))


def test_sd2s_base_models_are_read_where_the_file_or_the_user_tells(small_kinds, tmp_path):
    pipeline, file = small_kind("sd21"), tmp_path / "two.safetensors"
    write_original(pipeline, file)
    assert load_pipeline(file).scheduler.config.prediction_type == "v_prediction"
    weights = load_file(file)
    save_file(weights, file)  # without ModelSpec's metadata
    read = {config: load_pipeline(file, single_file_config=config) for config in (None, "sd21_base")}
    assert read[None].scheduler.config.prediction_type == "v_prediction" and read[None].unet.config.sample_size == 96
    base = read["sd21_base"]
    assert base.scheduler.config.prediction_type == "epsilon" and base.unet.config.sample_size == 64
    save_file(weights, file, {"modelspec.prediction_type": "epsilon"})
    assert load_pipeline(file).unet.config.sample_size == 64


def test_the_hub_caches_configuration_comes_before_ours(small_kinds, tmp_path, monkeypatch):
    pipeline, file = small_kind("sd15"), tmp_path / "one.safetensors"
    write_original(pipeline, file)
    write_configuration("sd15", tmp_path / "cached")
    scheduler = tmp_path / "cached/scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"beta_end": 0.012', '"beta_end": 0.013'))
    requested = []
    monkeypatch.setattr(slimstep.models.folder.huggingface_hub, "try_to_load_from_cache",
                        lambda name, file: requested.append(name) or str(tmp_path / "cached" / file))  # fmt: skip
    assert load_pipeline(file).scheduler.config.beta_end == 0.013
    assert requested == ["stable-diffusion-v1-5/stable-diffusion-v1-5"]


def test_an_old_training_checkpoint_is_read_without_what_else_is_in_it(small_kinds, tmp_path, monkeypatch):
    """Half precision, averaged weights beside, buffers, and callbacks of a library that nobody has."""
    pipeline, file = small_kind("sd15").to(dtype=torch.float16), tmp_path / "last.ckpt"
    weights = original_weights(pipeline)
    ema = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": torch.zeros_like(value)
                for key, value in weights.items() if key.startswith("model.")}  # fmt: skip
    assert len(ema) > 100
    more = {"alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.tensor(0.9),
            "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}  # fmt: skip
    library = types.ModuleType("unheard_of")
    library.Callback = type("Callback", (), {"__module__": "unheard_of", "__qualname__": "Callback"})
    monkeypatch.setitem(sys.modules, "unheard_of", library)
    callback = library.Callback()
    callback.best = [1.0]
    callbacks = {library.Callback: callback}
    torch.save({"state_dict": weights | ema | more, "global_step": 7, "callbacks": callbacks}, file)
    monkeypatch.delitem(sys.modules, "unheard_of")
    assert_equal_weights(load_pipeline(file, "float16", allow_pickle=True), pipeline)


def test_pickles_run_nothing(tmp_path):
    class Wicked:
        def __reduce__(self):
            return open, (str(tmp_path / "written"), "w")

    for name, save in (("zip", torch.save), ("plain", lambda what, file: file.write_bytes(pickle.dumps(what)))):
        file = tmp_path / f"{name}.ckpt"
        save({"state_dict": {"weight": Wicked()}}, file)
        with pytest.raises(ValueError, match="holds no weights|no checkpoint of torch's"):
            load_pickled(file)
    assert not (tmp_path / "written").exists()
    torch.save([torch.zeros(1)], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds no weights"):
        load_pickled(tmp_path / "list.ckpt")


@pytest.mark.parametrize(("prefix", "message"), [
    ("model.diffusion_model.", r"it holds no UNet \(no weights are called model.diffusion_model.…\): LoRAs"),
    ("first_stage_model.", r"it holds no VAE .*: model.vae=FOLDER_OR_FILE gives it one"),
    ("cond_stage_model.", r"it holds no text encoder .* find the whole one"),
])  # fmt: skip
def test_a_file_without_one_of_its_networks_is_an_error_that_names_it(file, sd15_folder, tmp_path, prefix, message):
    part = tmp_path / "part.safetensors"
    save_file({key: value for key, value in load_file(file).items() if not key.startswith(prefix)}, part)
    with pytest.raises(ValueError, match=message):
        load_pipeline(part, single_file_config=str(sd15_folder))


def test_a_file_without_a_vae_takes_another(file, sd15_folder, tmp_path):
    part = tmp_path / "part.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "first_stage" not in key}, part)
    folder = str(sd15_folder)
    assert_equal_weights(load_pipeline(part, single_file_config=folder, vae=folder), load_pipeline(folder))


def test_what_cannot_be_read_is_one_line(file, sd15_folder, tmp_path):
    def refused(path, match, **options):
        with pytest.raises(ValueError, match=match) as error:
            load_pipeline(path, **options)
        assert "\n" not in str(error.value)

    config = {"single_file_config": str(sd15_folder)}
    refused(tmp_path / "gone.safetensors", "gone.safetensors' does not exist", **config)
    refused(file, r"time_embedding.linear_1.weight expected shape .*; model.single_file_config=FOLDER gives it another")
    refused(file, r"=/nowhere must be a diffusers folder, .*sdxl.*is no folder", single_file_config="/nowhere")
    inpainting = tmp_path / "inpainting.safetensors"
    save_file({**load_file(file), "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}, inpainting)
    refused(
        inpainting, r"of the kind of stable-diffusion-v1-5/stable-diffusion-inpainting, which is not in the hub cache"
    )
    (tmp_path / "text.safetensors").write_text("no weights")
    refused(tmp_path / "text.safetensors", "text.safetensors' is incomplete or damaged", **config)
    for place in ("middle_block.1.", "transformer.text_model.encoder.layers.0.mlp.fc1."):
        part = tmp_path / "part.safetensors"
        save_file({key: value for key, value in load_file(file).items() if place not in key}, part)
        refused(
            part, "part.safetensors' is incomplete or damaged: it lacks weights that the configuration in", **config
        )
