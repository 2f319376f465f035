"""Small random pipelines of transformers, as folders for the jobs."""

import json

import pytest
from PIL import Image

from scripts.random_pipeline import TRANSFORMERS, make_small
from slimstep.models.family import family_of
from slimstep.models.pipeline import load_pipeline
from tests.tiny import slow


@pytest.mark.parametrize("name", ["flux", *slow(*(name for name in TRANSFORMERS if name != "flux"))])
def test_a_random_transformer_draws_and_its_kin_are_slimmer(tmp_path, name):
    family = {member: load_pipeline(folder) for member, folder in make_small(name, tmp_path).items()}
    for pipeline in family.values():
        kwargs = family_of(pipeline).call(pipeline, 1.0) | dict.fromkeys(("height", "width"), 32)
        (image,) = pipeline("a b", num_inference_steps=2, **kwargs).images
        assert image.size == (32, 32)
    blocks = {member: len(pipeline.transformer.kept_blocks) for member, pipeline in family.items()}
    assert blocks["pruned"] < blocks["teacher"] and ("narrow" in family) == (name not in ("sana", "qwen_image"))
    assert json.loads((tmp_path / "pruned/export_report.json").read_text())["is_stock"]
    if "narrow" in family:
        assert family["narrow"].vae.decoder.conv_in.out_channels < family["teacher"].vae.decoder.conv_in.out_channels


def test_a_random_stable_video_diffusion_draws_and_its_kin_lack_blocks_in_time(tmp_path):
    family = {member: load_pipeline(folder) for member, folder in make_small("svd", tmp_path).items()}
    assert [*family] == ["teacher", "pruned"]
    for pipeline in family.values():
        kwargs = family_of(pipeline).call(pipeline, 1.0)
        (video,) = pipeline(Image.new("RGB", (16, 16)), num_inference_steps=2, **kwargs).frames
        assert len(video) == 3 and video[0].size == (16, 16)
    removed = {*family["teacher"].unet.kept_blocks} - {*family["pruned"].unet.kept_blocks}
    assert removed and all(".temporal_" in block for block in removed)
