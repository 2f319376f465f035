"""The original layout: diffusers' own reader finds every weight in it, and there and back is the identity."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.known import write_configuration
from slimstep.models.original_layout import original_weights, write_original
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from slimstep.prune.decoder import choose_channels, pruned_vae, pruned_widths
from tests.models.conftest import assert_equal_weights, small_kind

KINDS = ("sd15", "sd21", "sdxl")
LANDMARKS = {
    "sd15": ["cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight"],
    "sd21": ["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight",
             "cond_stage_model.model.positional_embedding"],
    "sdxl": ["conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
             "model.diffusion_model.label_emb.0.2.bias", "conditioner.embedders.1.model.text_projection",
             "conditioner.embedders.1.model.ln_final.weight"],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_reads_the_written_file_to_equal_weights(small_kinds, tmp_path, kind):
    pipeline, file = small_kind(kind), tmp_path / "one.safetensors"
    write_original(pipeline, file)
    assert set(LANDMARKS[kind]) <= load_file(file).keys()
    write_configuration(kind, tmp_path / "config")
    stock = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    assert_equal_weights(stock.from_single_file(str(file), config=str(tmp_path / "config")), pipeline)


@pytest.mark.parametrize(("kind", "dtype"), [(kind, "float32") for kind in KINDS] + [("sd15", "float16")])
def test_there_and_back_is_the_identity(small_kinds, tmp_path, kind, dtype):
    pipeline, file = small_kind(kind).to(dtype=getattr(torch, dtype)), tmp_path / "one.safetensors"
    write_original(pipeline, file)
    loaded = load_pipeline(file, dtype=None)
    assert_equal_weights(loaded, pipeline)
    export_pipeline(loaded, tmp_path / "folder", "fp16" if dtype == "float16" else None)
    again = load_pipeline(tmp_path / "folder", None, "fp16" if dtype == "float16" else None)
    assert_equal_weights(again, pipeline)
    assert original_weights(again).keys() == load_file(file).keys()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_file_tells_what_its_pipeline_predicts(small_kinds, tmp_path, prediction_type):
    pipeline, file = small_kind("sd15", prediction_type), tmp_path / "one.safetensors"
    write_original(pipeline, file)
    assert load_pipeline(file).scheduler.config.prediction_type == prediction_type
    weights = load_file(file)
    assert ("v_pred" in weights) == (prediction_type == "v_prediction")
    save_file(weights, file)  # as a web UI leaves it, without metadata
    message = "v_prediction" if prediction_type == "v_prediction" else "epsilon"
    assert load_pipeline(file).scheduler.config.prediction_type == message


def test_zero_terminal_snr_is_reported_as_well(small_kinds, tmp_path):
    pipeline, file = small_kind("sd15", "v_prediction"), tmp_path / "one.safetensors"
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    pipeline.register_modules(scheduler=scheduler)
    write_original(pipeline, file)
    assert torch.equal(load_pipeline(file).scheduler.alphas_cumprod, scheduler.alphas_cumprod)


def test_what_web_uis_cannot_know_has_no_original_layout(small_kinds, tmp_path):
    pipeline = small_kind("sd15")
    pruned = with_unet(pipeline, pipeline.unet.with_architecture({"mid_block.attentions.0": 0}))
    shallow = with_unet(pipeline, PrunableUNet2DConditionModel.from_config(pipeline.unet.config, layers_per_block=1))
    widths = pruned_widths(pipeline.vae, 0.5)
    vae = pruned_vae(pipeline.vae, choose_channels(pipeline.vae, widths, "first"), widths)
    fields = {
        r"its UNet is pruned \(mid_block.attentions.0\)": pruned,
        r"its UNet is not one of Stable Diffusion's \(layers_per_block=1\)": shallow,
        "its VAE decoder is pruned": with_unet(pipeline, pipeline.unet, vae=vae),
    }
    for message, other in fields.items():
        with pytest.raises(ValueError, match=f"no original layout, since {message}; .* folder over instead"):
            write_original(other, tmp_path / "one.safetensors")
    assert not list(tmp_path.iterdir())
