"""slimstep convert: both ways, and one line for what it cannot do."""

import sys

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from slimstep.commands.convert import main
from slimstep.models.convert import left_out
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from tests.models.conftest import assert_equal_weights
from tests.tiny import tiny_pipeline, tiny_sdxl_pipeline
from tests.user_errors import error_line


@pytest.fixture
def convert(monkeypatch, capfd):
    """Runs the command line; its exit code and what it wrote to stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        try:
            main()
        except SystemExit as leaving:
            return leaving.code, capfd.readouterr().err
        return 0, capfd.readouterr().err

    return run


def test_a_folder_becomes_a_file_and_the_file_a_folder(convert, sd15_folder, tmp_path, caplog):
    file, folder, config = tmp_path / "one.safetensors", tmp_path / "folder", ("--config", sd15_folder)
    assert convert(sd15_folder, file)[0] == 0
    said = " ".join(record.message for record in caplog.records)
    assert "has to know prediction_type=v_prediction" in said
    assert "reading" in said and "writing 0.00 GB" in said and "done in" in said
    assert convert(file, folder, *config)[0] == 0
    assert_equal_weights(load_pipeline(folder), load_pipeline(sd15_folder))
    assert file.stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "one.safetensors"]


def test_a_web_uis_file_becomes_the_usual_one(convert, sd15_folder, tmp_path):
    convert(sd15_folder, tmp_path / "usual.safetensors")
    usual = load_file(tmp_path / "usual.safetensors")
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
    mixed = {}
    for key, value in usual.items():
        place, found, rest = key.partition(".mid.attn_1.")
        name, _, end = rest.partition(".")
        key = f"{place}{found}{names[name]}.{end}" if found else key
        mixed[key] = value.flatten(1) if found and value.ndim > 1 else value
    save_file({key: value.contiguous() for key, value in mixed.items()}, tmp_path / "web_ui.safetensors")
    convert(tmp_path / "web_ui.safetensors", tmp_path / "folder", "--config", sd15_folder)
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == usual.keys() and all(torch.equal(again[key], usual[key]) for key in usual)


def test_a_file_without_a_vae_is_given_one(convert, sd15_folder, tmp_path):
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    convert(sd15_folder, whole)
    save_file({key: value for key, value in load_file(whole).items() if "first_stage" not in key}, part)
    arguments = (part, tmp_path / "folder", "--config", sd15_folder)
    assert "it holds no VAE" in error_line(*convert(*arguments))
    assert convert(*arguments, "--vae", sd15_folder / "vae")[0] == 0
    assert_equal_weights(load_pipeline(tmp_path / "folder"), load_pipeline(sd15_folder))


def test_dtypes_are_kept_or_chosen(convert, sd15_folder, tmp_path):
    half, folder = tmp_path / "half.safetensors", tmp_path / "half"
    convert(sd15_folder, half, "--dtype", "float16")
    assert {value.dtype for key, value in load_file(half).items() if key not in ("v_pred", "ztsnr")} == {torch.float16}
    convert(half, folder, "--config", sd15_folder, "--variant", "fp16")
    assert (folder / "unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    assert load_pipeline(folder, None, "fp16").text_encoder.dtype == torch.float16
    assert "has no weights of variant=None: choose fp16" in error_line(*convert(folder, tmp_path / "two.safetensors"))
    assert convert(folder, tmp_path / "two.safetensors", "--variant", "fp16", "--dtype", "bfloat16")[0] == 0
    assert load_file(tmp_path / "two.safetensors")["model.diffusion_model.out.2.bias"].dtype == torch.bfloat16


def test_nothing_is_replaced_unless_asked(convert, sd15_folder, tmp_path):
    file = tmp_path / "mine.safetensors"
    file.write_text("precious")
    assert "mine.safetensors exists: --force replaces it" in error_line(*convert(sd15_folder, file))
    assert file.read_text() == "precious"
    assert convert(sd15_folder, file, "--force")[0] == 0 and load_file(file)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/thesis.txt").write_text("precious")
    here = (file, tmp_path / "folder", "--config", sd15_folder)
    assert "folder exists: --force replaces it" in error_line(*convert(*here))
    assert "holds something else than a pipeline" in error_line(*convert(*here, "--force"))


def test_what_cannot_be_converted_is_one_line(convert, sd15_folder, tmp_path):
    pipeline = load_pipeline(sd15_folder)
    pruned = with_unet(pipeline, pipeline.unet.with_architecture({"down_blocks.0.attentions.1": 0}))
    export_pipeline(pruned, tmp_path / "pruned")
    file = tmp_path / "one.safetensors"
    cases = {
        "no original layout, since its UNet is pruned": (tmp_path / "pruned", file),
        "must end in .safetensors": (sd15_folder, tmp_path / "one"),
        "is a file, and so is the source": (file, tmp_path / "two.safetensors"),
        "one.safetensors' does not exist": (file, tmp_path / "folder"),
        "'/nowhere' is no folder": ("/nowhere", file),
        "--config=sd15 is for a single file": (sd15_folder, file, "--config", "sd15"),
    }
    for message, arguments in cases.items():
        line = error_line(*convert(*arguments))
        assert message in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


@pytest.mark.parametrize(
    ("make", "change", "arguments"),
    [
        (tiny_pipeline, {}, ""),
        (tiny_sdxl_pipeline, {"scaling_factor": 0.13025}, ""),
        (tiny_pipeline, {"scaling_factor": 0.5}, "scaling_factor=0.5"),
        (tiny_pipeline, {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, ""),  # Stable Diffusion's do not count
        (tiny_sdxl_pipeline, {"scaling_factor": 0.13025, "latents_mean": [0.0] * 4, "latents_std": [2.0] * 4},
         "the VAE's latents_mean and latents_std"),
    ],
)  # fmt: skip
def test_what_a_single_file_has_no_place_for_is_reported(make, change, arguments):
    pipeline = make()
    pipeline.vae.register_to_config(**change)
    assert left_out(pipeline) == arguments


def test_a_zero_snr_scheduler_is_reported_by_its_fields():
    pipeline = tiny_pipeline("v_prediction")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    assert left_out(pipeline) == "prediction_type=v_prediction, rescale_betas_zero_snr=True"
