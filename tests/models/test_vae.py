"""The narrow autoencoder in other hands: stock diffusers loads it without this project, in every pipeline and mode."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from slimstep.models.vae import NarrowAutoencoderKL
from slimstep.prune.decoder import choose_channels, pruned_vae, pruned_widths
from tests.models.conftest import paint

ONE_ATTENTION = {"down_blocks.0.attentions.1": 0}

ELSEWHERE = """
import torch
import numpy as np
from PIL import Image
from diffusers import AutoModel, AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained('export', trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
options = dict(num_inference_steps=2, output_type='np')
draw = lambda: torch.Generator().manual_seed(0)
images = pipe('a b', height=16, width=16, generator=draw(), **options).images
photo, mask = Image.radial_gradient('L').resize((16, 16)).convert('RGB'), Image.new('L', (16, 16), 255)
AutoPipelineForImage2Image.from_pipe(pipe)('a b', image=photo, strength=0.8, generator=draw(), **options)
AutoPipelineForInpainting.from_pipe(pipe)('a b', image=photo, mask_image=mask, height=16, width=16, **options)
z = torch.randn(2, 4, 16, 16, generator=draw())
with torch.no_grad():
    plain = pipe.vae.decode(z)[0]
    pipe.vae.enable_slicing()
    assert torch.equal(pipe.vae.decode(z)[0], torch.cat([pipe.vae.decode(row[None])[0] for row in z]))
    pipe.vae.disable_slicing()
    pipe.vae.enable_tiling()
    assert pipe.vae.decode(z)[0].shape == plain.shape
    pipe.vae.disable_tiling()
    alone = AutoModel.from_pretrained('export/vae', trust_remote_code=True)
    assert torch.equal(alone.decode(z)[0], plain)
    for dtype, most in ((torch.float16, 0.02), (torch.bfloat16, 0.2)):
        pipe.vae.to(dtype)
        assert (pipe.vae.decode(z.to(dtype))[0].float() - plain).abs().max() < most, dtype
torch.save(images, 'images.pt', pickle_protocol=4)
"""


def with_narrow_decoder(pipeline, architecture=None, width=0.5):
    widths = pruned_widths(pipeline.vae, width)
    vae = pruned_vae(pipeline.vae, choose_channels(pipeline.vae, widths, "magnitude"), widths)
    return with_unet(pipeline, PrunableUNet2DConditionModel.from_unet(pipeline.unet, architecture or {}), vae=vae)


@pytest.mark.parametrize("architecture", [None, ONE_ATTENTION], ids=["stock UNet", "pruned UNet"])
def test_an_export_works_where_this_project_is_unknown(pipeline, tmp_path, elsewhere, architecture):
    student = with_narrow_decoder(pipeline, architecture)
    report = export_pipeline(student, tmp_path / "export")
    assert not report.is_stock and report.load.endswith(", trust_remote_code=True)")
    assert report.obstacles[-1] == "vae.decoder: its widths (4, 4) are not its encoder's"
    index = json.loads((tmp_path / "export" / "model_index.json").read_text())
    assert index["vae"][1] == "NarrowAutoencoderKL"
    elsewhere(tmp_path, ELSEWHERE)
    images = torch.from_numpy(torch.load(tmp_path / "images.pt", weights_only=False)).permute(0, 3, 1, 2)
    torch.testing.assert_close(images, paint(student), rtol=0, atol=1e-5)


def test_save_load_save_load(pipeline, tmp_path):
    student = with_narrow_decoder(pipeline, ONE_ATTENTION)
    images = paint(student)
    for name in ("one", "two", "two"):
        export_pipeline(student, tmp_path / name)
        student = load_pipeline(tmp_path / name)
        assert isinstance(student.vae, NarrowAutoencoderKL) and not student.vae.training
        assert torch.equal(paint(student), images)


def test_a_decoder_of_full_width_leaves_as_a_plain_autoencoder(pipeline, tmp_path):
    report = export_pipeline(with_narrow_decoder(pipeline, width=1.0), tmp_path / "export")
    assert report.is_stock and report.obstacles == ()
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "export").vae) is AutoencoderKL


def test_a_narrow_decoder_without_its_weights_is_named(pipeline, tmp_path):
    export_pipeline(with_narrow_decoder(pipeline), tmp_path)
    config = tmp_path / "vae" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "decoder_block_out_channels": [8, 8]}))
    with pytest.raises(ValueError, match="is incomplete or damaged: .*decoder"):
        load_pipeline(tmp_path)
