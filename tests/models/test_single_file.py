"""Single files in the original layout: the same pipeline as the folder's, and one line for what cannot be read."""

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from models.pipeline import export_pipeline, load_pipeline
from models.unet import PrunableUNet2DConditionModel
from tests.models.conftest import paint
from tests.models.original_layout import original_layout


@pytest.fixture(scope="module")
def file(tmp_path_factory, tiny_pipeline_folder):
    """The random pipeline's weights as one file."""
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save_file(original_layout(StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder)), path)
    return path


def test_a_single_file_paints_what_its_folder_paints(file, tiny_pipeline_folder, tmp_path, capfd):
    loaded = load_pipeline(file, single_file_config=str(tiny_pipeline_folder))
    assert capfd.readouterr() == ("", "")
    assert isinstance(loaded.unet, PrunableUNet2DConditionModel) and not loaded.unet.training
    folder = load_pipeline(tiny_pipeline_folder)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(pipeline, part).state_dict() for pipeline in (loaded, folder))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), part
    assert torch.equal(paint(loaded), paint(folder))
    export_pipeline(loaded, tmp_path / "export")
    assert torch.equal(paint(DiffusionPipeline.from_pretrained(tmp_path / "export")), paint(folder))
    half = load_pipeline(file, torch.bfloat16, single_file_config=str(tiny_pipeline_folder))
    assert half.unet.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16


@pytest.mark.parametrize("names", [
    {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"},
    {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_a_web_uis_names_of_the_vaes_attention_are_read(file, tiny_pipeline_folder, tmp_path, names, kind):
    mixed = {}
    for key, value in load_file(file).items():
        place, _, rest = key.partition(".mid.attn_1.")
        if rest and (name := rest.split(".")[0]) in names:
            key = f"{place}.mid.attn_1.{names[name]}.{rest.split('.')[1]}"
            value = value.flatten(1) if value.ndim > 1 else value  # linear layers, no 1×1 convolutions
        mixed[key] = value.contiguous()
    web_ui = tmp_path / f"web_ui.{kind}"
    save_file(mixed, web_ui) if kind == "safetensors" else torch.save({"state_dict": mixed, "global_step": 7}, web_ui)
    loaded = load_pipeline(web_ui, allow_pickle=True, single_file_config=str(tiny_pipeline_folder))
    assert torch.equal(paint(loaded), paint(load_pipeline(tiny_pipeline_folder)))


def test_a_checkpoint_of_pickles_is_read_only_where_that_is_allowed(file, tiny_pipeline_folder, tmp_path):
    config, pickled = str(tiny_pipeline_folder), tmp_path / "tiny.ckpt"
    torch.save({"state_dict": load_file(file)}, pickled)
    with pytest.raises(ValueError, match=r"tiny.ckpt' holds pickles.*model.allow_pickle=true"):
        load_pipeline(pickled, single_file_config=config)
    loaded = load_pipeline(pickled, allow_pickle=True, single_file_config=config)
    assert torch.equal(paint(loaded), paint(load_pipeline(tiny_pipeline_folder)))


def test_what_cannot_be_read_is_one_line(file, tiny_pipeline_folder, tmp_path):
    def told(path, match, **options):
        with pytest.raises(ValueError, match=match) as error:
            load_pipeline(path, **options)
        assert "\n" not in str(error.value)

    config = {"single_file_config": str(tiny_pipeline_folder)}
    told(tmp_path / "gone.safetensors", "gone.safetensors' does not exist", **config)
    told(file, r"is a single file; model.single_file_config=FOLDER .*stable-diffusion-v1-5.*not in the hub cache")
    told(file, r"is a single file; .*/nowhere' is no folder", single_file_config="/nowhere")
    (tmp_path / "text.safetensors").write_text("no weights")
    told(tmp_path / "text.safetensors", "text.safetensors' is incomplete or damaged", **config)
    for place in ("middle_block.1.", "transformer.text_model.encoder.layers.0.mlp.fc1."):
        part = tmp_path / "part.safetensors"
        save_file({key: value for key, value in load_file(file).items() if place not in key}, part)
        told(part, "part.safetensors' is incomplete or damaged: it lacks weights that the configuration in", **config)
