"""The model card of an export says what was done, how it is sampled, and what was measured, and hubs can read it."""

import numpy as np
import pytest
from huggingface_hub import ModelCard

from scripts.random_transformers import small_cogvideox_pipeline, small_wan_pipeline
from slimstep.models.card import Origin, origin_of, write_card
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from slimstep.models.sizes import set_resolution

DEPTHS = {"down_blocks.0.attentions.1": 0, "mid_block.attentions.0": 3}


@pytest.fixture
def student(pipeline):
    return with_unet(pipeline, PrunableUNet2DConditionModel.from_unet(pipeline.unet, DEPTHS))


def test_a_card_says_what_was_removed_and_how_to_sample(student, tmp_path):
    export_pipeline(student, tmp_path / "export", origin=Origin("maker/teacher-1.5", 8, 2.5))
    card = ModelCard.load(tmp_path / "export/README.md")
    assert card.data.library_name == "diffusers" and card.data.base_model == "maker/teacher-1.5"
    assert "without `down_blocks.0.attentions.1`; copied: `mid_block.attentions.0` (runs 3 times)." in card.text
    assert "num_inference_steps=8, guidance_scale=2.5" in card.text and ", trust_remote_code=True)" in card.text
    assert "decoder: as the teacher's" in card.text and "Nothing was measured on it yet." in card.text


def test_results_take_their_place_and_a_stock_student_needs_no_trust(pipeline, tmp_path):
    whole = with_unet(pipeline, PrunableUNet2DConditionModel.from_unet(pipeline.unet))
    export_pipeline(whole, tmp_path / "export", origin=Origin(str(tmp_path / "my teacher"), 4, 1.0))
    write_card(tmp_path / "export", ["CLIP score 1.00 ± 0.10"])
    card = ModelCard.load(tmp_path / "export/README.md")
    assert "- CLIP score 1.00 ± 0.10" in card.text and "Nothing was measured" not in card.text
    assert "# A student of my teacher" in card.text, "a path of this machine is nobody's business"
    assert str(tmp_path) not in card.text and "trust_remote_code" not in card.text and card.data.base_model is None


def test_exports_without_an_origin_have_no_card(student, tmp_path):
    export_pipeline(student, tmp_path / "export")
    assert origin_of(tmp_path / "export") is None and not (tmp_path / "export/README.md").exists()


def test_the_report_of_an_earlier_versions_export_is_read(student, tmp_path):
    origin = Origin("maker/teacher-1.5", 8, 2.5)
    export_pipeline(student, tmp_path / "export", origin=origin)
    (tmp_path / "export/export_report.json").rename(tmp_path / "export/verdict.json")
    assert origin_of(tmp_path / "export") == origin
    write_card(tmp_path / "export", ["CLIP score 1.00 ± 0.10"])
    assert "CLIP score 1.00" in (tmp_path / "export/README.md").read_text()


@pytest.mark.parametrize("make", [small_cogvideox_pipeline, small_wan_pipeline])
def test_the_call_on_a_card_draws_videos_of_the_models_own_size(make, tmp_path):
    made = make()
    set_resolution(made, "16x32", frames=9)
    made.save_pretrained(tmp_path / "model")
    export_pipeline(load_pipeline(tmp_path / "model"), tmp_path / "export", origin=Origin("maker/videos", 2, 2.5))
    code = (tmp_path / "export/README.md").read_text().split("```")[1].removeprefix("python")
    names: dict = {}
    exec(code.replace("THIS_FOLDER", str(tmp_path / "export")), names)
    assert np.asarray(names["video"]).shape == (9, 16, 32, 3)
