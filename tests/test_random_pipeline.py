"""Small random pipelines of transformers, as folders for the jobs."""

import json

import pytest

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
