"""Loading, handing over, and the stock pipelines around a pruned UNet."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

from slimstep.engine.files import write_text
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.original_layout import write_original
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from tests.models.conftest import assert_equal_weights, paint, small_stock_unet

ONE_ATTENTION = {"down_blocks.0.attentions.1": 0}  # no stock config says this
NO_MID = dict.fromkeys(("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"), 0)


@pytest.fixture
def folder(pipeline, tmp_path) -> Path:
    """A stock diffusers folder."""
    pipeline.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def with_architecture(pipeline, architecture):
    return with_unet(pipeline, PrunableUNet2DConditionModel.from_unet(pipeline.unet, architecture))


def test_a_loaded_pipeline_paints_what_the_saved_one_paints(pipeline, folder, capfd):
    loaded = load_pipeline(folder)
    assert capfd.readouterr() == ("", "")
    assert isinstance(loaded.unet, PrunableUNet2DConditionModel)
    assert not loaded.unet.training and not loaded.text_encoder.training and not loaded.vae.training
    assert torch.equal(paint(loaded), paint(pipeline))
    assert loaded.config.requires_safety_checker is False
    assert load_pipeline(folder, dtype="bfloat16").unet.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("architecture", "is_stock"),
    [
        (NO_MID, True),
        (ONE_ATTENTION, False),
        ({**ONE_ATTENTION, "down_blocks.3": 0, "up_blocks.2.attentions.1": 3}, False),
    ],
)
def test_save_load_save_load(pipeline, tmp_path, architecture, is_stock):
    first = with_architecture(pipeline, architecture)
    images = paint(first)
    for name in ("one", "two", "two"):  # the last replaces the one before
        report = export_pipeline(first, tmp_path / name)
        assert report.is_stock == is_stock and bool(report.obstacles) != is_stock
        first = load_pipeline(tmp_path / name)
        assert torch.equal(paint(first), images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_an_expressible_export_is_plain_diffusers(pipeline, tmp_path):
    student = with_architecture(pipeline, NO_MID)
    report = export_pipeline(student, tmp_path / "export")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "export")
    assert type(loaded.unet) is UNet2DConditionModel and loaded.unet.mid_block is None
    torch.testing.assert_close(paint(loaded), paint(student), rtol=0, atol=1e-5)
    assert report.load == f'DiffusionPipeline.from_pretrained("{tmp_path / "export"}")'
    assert isinstance(student.unet, PrunableUNet2DConditionModel), "exporting changed the pipeline"


def test_an_export_carries_its_class_and_is_readable_by_others(pipeline, tmp_path):
    report = export_pipeline(with_architecture(pipeline, ONE_ATTENTION), tmp_path / "export")
    (code,) = (tmp_path / "export" / "unet").glob("*.py")
    index = json.loads((tmp_path / "export" / "model_index.json").read_text())
    assert index["unet"] == [code.stem, "PrunableUNet2DConditionModel"]
    assert report.obstacles == ("down_blocks.0.attentions.1 (is removed while another of its level stays)",)
    assert report.load.endswith(", trust_remote_code=True)")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "export").rglob("*") if path.is_file()}
    assert modes == {0o644}


def test_an_exported_text_encoder_has_the_names_of_published_ones(pipeline, tmp_path):
    """Whether it was made here, read from a folder or from a single file."""
    export_pipeline(with_architecture(pipeline, {}), tmp_path / "made")
    pipeline.save_pretrained(tmp_path / "bare")
    write_original(pipeline, tmp_path / "one.safetensors")
    config = {"single_file_config": str(tmp_path / "bare")}
    export_pipeline(load_pipeline(tmp_path / "bare"), tmp_path / "read")
    export_pipeline(load_pipeline(tmp_path / "one.safetensors", **config), tmp_path / "single")
    export_pipeline(load_pipeline(tmp_path / "single"), tmp_path / "again")
    for name in ("made", "read", "single", "again"):
        keys = load_file(tmp_path / name / "text_encoder/model.safetensors").keys()
        assert {key.split(".")[0] for key in keys} == {"text_model"}, name
        assert_equal_weights(load_pipeline(tmp_path / name), pipeline)


def test_an_export_does_not_tell_what_went_through_it_before(pipeline, tmp_path):
    """Tokenizers keep the truncation and padding of their last call and write them into tokenizer.json."""
    student = with_architecture(pipeline, NO_MID)
    contents = []
    for _ in range(2):
        export_pipeline(student, tmp_path / "export")
        files = (path for path in (tmp_path / "export").rglob("*") if path.is_file())
        contents.append({path.relative_to(tmp_path): path.read_bytes() for path in files})
        student.tokenizer(["a", "b"], padding="max_length", max_length=8, truncation=True)
    assert contents[0] == contents[1]


def test_an_export_replaces_nothing_but_a_pipeline(pipeline, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds something else than a pipeline"):
        export_pipeline(pipeline, tmp_path)


@pytest.mark.slow
def test_an_export_loads_where_this_project_is_unknown(pipeline, tmp_path, elsewhere):
    architecture = {**ONE_ATTENTION, "up_blocks.1.resnets.0": 0, "mid_block.attentions.0": 2}
    student = with_architecture(pipeline, architecture)
    export_pipeline(student, tmp_path / "export")
    program = (
        "import torch\n"
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained('export', trust_remote_code=True)\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "torch.save(pipe('a b', num_inference_steps=2, height=16, width=16, output_type='np',\n"
        "                generator=torch.Generator().manual_seed(0)).images, 'images.pt', pickle_protocol=4)\n"
    )
    elsewhere(tmp_path, program)
    images = torch.load(tmp_path / "images.pt", weights_only=False)
    torch.testing.assert_close(torch.from_numpy(images).permute(0, 3, 1, 2), paint(student), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/at-all", "model 'nowhere/at-all' is no folder, and not in the hub cache: .* HF_HUB_OFFLINE=1"),
        ("{empty}", "is no UNet pipeline saved by diffusers: .*model_index.json"),
        ("{other}", "has the UNet class UNet2DModel; pruning needs"),
        ("{torn}", "is incomplete or damaged: .*diffusion_pytorch_model"),
        ("{mute}", r"model_index.json names \['tokenizer'\], which it lacks"),
        ("{stale}", r"unet/diffusion_pytorch_model.safetensors lacks \d+ of the weights .*, mid_block"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(name, message, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    if "other" in name:
        config = folder / "unet" / "config.json"
        config.write_text(config.read_text().replace("UNet2DConditionModel", "UNet2DModel"))
    if "torn" in name:
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    if "mute" in name:
        shutil.rmtree(folder / "tokenizer")
    if "stale" in name:  # blocks deleted, config not updated
        small_stock_unet(mid_block_type=None).save_pretrained(tmp_path / "no_mid")
        shutil.copy(tmp_path / "no_mid" / "diffusion_pytorch_model.safetensors", folder / "unet")
    places = {"empty": tmp_path / "empty"} | dict.fromkeys(("other", "torn", "mute", "stale"), folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_pipeline(name.format(**places))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [5, 8, 9])
def test_a_unet_that_takes_more_than_latents_is_refused(folder, tmp_path, channels):
    """Depth, editing and inpainting, also as the configuration of a single file."""
    shutil.rmtree(folder / "unet")
    small_stock_unet(in_channels=channels).save_pretrained(folder / "unet")
    message = (
        f"has a UNet with in_channels={channels} and out_channels=4, as .* only one that takes nothing but latents"
    )
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder)
    (tmp_path / "one.safetensors").write_text("")
    with pytest.raises(ValueError, match=f"model.single_file_config=.*{message}"):
        load_pipeline(tmp_path / "one.safetensors", single_file_config=str(folder))


def save_with_checker(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(text_config=sizes, vision_config=sizes)
    parts = {"safety_checker": StableDiffusionSafetyChecker(config), "feature_extractor": CLIPImageProcessor()}
    StableDiffusionPipeline(**{**pipeline.components, **parts}).save_pretrained(folder)


@pytest.mark.parametrize("absent", [["safety_checker", "feature_extractor"], ["safety_checker"], ["feature_extractor"]])
def test_a_folder_without_its_safety_checker_is_read_and_handed_over_as_such(folder, pipeline, tmp_path, absent):
    save_with_checker(pipeline, folder)
    assert load_pipeline(folder).safety_checker is not None
    for part in absent:
        shutil.rmtree(folder / part)
    bare = load_pipeline(folder)
    assert torch.equal(paint(bare), paint(pipeline))
    export_pipeline(bare, tmp_path / "export")
    index = json.loads((tmp_path / "export/model_index.json").read_text())
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert index["requires_safety_checker"] is False
    assert torch.equal(paint(DiffusionPipeline.from_pretrained(tmp_path / "export")), paint(pipeline))


def test_a_hub_cache_may_lack_the_safety_checker_without_a_network_and_nothing_else(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some--model"
    snapshot = cached / "snapshots" / ("0" * 40)
    save_with_checker(pipeline, snapshot)
    write_text(cached / "refs/main", snapshot.name)
    assert load_pipeline("some/model").safety_checker is not None
    shutil.rmtree(snapshot / "safety_checker")
    bare = load_pipeline("some/model")
    assert bare.safety_checker is None
    assert torch.equal(paint(bare), paint(pipeline))
    shutil.rmtree(snapshot / "tokenizer")  # transformers would make one up
    with pytest.raises(ValueError, match="model 'some/model' is incomplete.*tokenizer"):
        load_pipeline("some/model")


# ---- the other pipelines of diffusers


@pytest.fixture
def student(pipeline):
    return with_architecture(pipeline, {**ONE_ATTENTION, "up_blocks.2.resnets.1": 0})


@pytest.fixture
def photo() -> Image.Image:
    return Image.radial_gradient("L").resize((16, 16)).convert("RGB")


def around(student, pipeline_class, **more):
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    keep = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    made = pipeline_class(**{k: student.components[k] for k in keep}, **extra, **more)
    made.set_progress_bar_config(disable=True)
    return made


def test_image_to_image_runs(student, photo):
    made = around(student, StableDiffusionImg2ImgPipeline)
    draw = torch.Generator().manual_seed(0)
    images = made("a b", image=photo, strength=0.8, num_inference_steps=3, generator=draw, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_inpainting_runs(student, photo):
    made = around(student, StableDiffusionInpaintPipeline)
    mask = Image.new("L", (16, 16), 255)
    assert paint(made, image=photo, mask_image=mask).shape == (1, 3, 16, 16)


def test_a_controlnet_made_for_the_stock_unet_steers_the_pruned_one(student, pipeline, photo):
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(4, 8)).eval()
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(block.weight)
    made = around(student, StableDiffusionControlNetPipeline, controlnet=controlnet)
    images = paint(made, image=photo)
    assert images.shape == (1, 3, 16, 16) and not torch.equal(images, paint(student))


SAVED_ELSEWHERE = """
import sys, torch
from diffusers import AutoModel, DiffusionPipeline
source, target = sys.argv[1:3]
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
alone = AutoModel.from_pretrained(f'{source}/unet', trust_remote_code=True)
assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), pipe.unet.parameters(), strict=True))
if target.endswith('lora'):
    pipe.load_lora_weights('lora.safetensors')
    pipe.fuse_lora()
    pipe.unload_lora_weights()
torch.save(pipe('a b', num_inference_steps=2, height=16, width=16, output_type='np',
                generator=torch.Generator().manual_seed(0)).images, f'{target}.pt', pickle_protocol=4)
pipe.save_pretrained(target, max_shard_size='20KB')
"""


@pytest.mark.slow
def test_a_copy_saved_elsewhere_loads_in_a_new_process_and_so_do_copies_of_it(pipeline, tmp_path, elsewhere):
    """Saved, saved with a LoRA fused, and saved again, each by a process that reads the one before."""
    export_pipeline(with_architecture(pipeline, ONE_ATTENTION), tmp_path / "export")
    generator = torch.Generator().manual_seed(0)
    path = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    out, inner = pipeline.unet.get_submodule(path).weight.shape
    lora = {"lora_A": torch.randn(2, inner, generator=generator), "lora_B": torch.randn(out, 2, generator=generator)}
    save_file({f"unet.{path}.{key}.weight": value for key, value in lora.items()}, tmp_path / "lora.safetensors")
    images = []
    for source, target in (("export", "copy"), ("copy", "lora"), ("lora", "again")):
        elsewhere(tmp_path, SAVED_ELSEWHERE, source, target)
        images.append(torch.from_numpy(torch.load(tmp_path / f"{target}.pt", weights_only=False)))
    copy, fused, again = images
    assert torch.equal(fused, again) and not torch.equal(copy, fused)
    assert torch.equal(paint(load_pipeline(tmp_path / "copy")), paint(load_pipeline(tmp_path / "export")))


def test_what_goes_to_the_hub_has_the_class_in_it(pipeline, tmp_path, monkeypatch):
    """Uploads are of a folder that save_pretrained has filled."""
    export_pipeline(with_architecture(pipeline, ONE_ATTENTION), tmp_path / "export")
    loaded, sent = load_pipeline(tmp_path / "export"), {}

    def upload(self, folder, *args, **kwargs):
        sent[type(self).__name__] = {str(path.relative_to(folder)) for path in Path(folder).rglob("*.py")}

    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda *a, **k: SimpleNamespace(repo_id="a/b"))
    monkeypatch.setattr("diffusers.utils.hub_utils.PushToHubMixin._upload_folder", upload)
    monkeypatch.setattr("diffusers.utils.hub_utils.load_or_create_model_card", lambda *a, **k: ModelCard("---\n---\n"))
    loaded.push_to_hub("a/b")
    loaded.unet.push_to_hub("a/b")
    (file,) = (path.name for path in (tmp_path / "export/unet").glob("*.py"))
    assert sent == {"StableDiffusionPipeline": {f"unet/{file}"}, "PrunableUNet2DConditionModel": {file}}
