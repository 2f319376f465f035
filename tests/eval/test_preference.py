"""Preference scores: they are the published formulas, and what cannot be had is told before anything is drawn."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from slimstep.eval.metrics.clip import ClipScorer
from slimstep.eval.metrics.preference import PickScore
from tests.eval.test_evaluation import SMALL
from tests.tiny import MAX_TOKENS, WIDTH, tiny_tokenizer
from tests.user_errors import error_line

PROMPTS = ["a cat", "two dogs on a very long road", "b", "a cat"]


def random_images(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 20, 28), generator=draw).to(torch.uint8)


@pytest.fixture(scope="module")
def pick_folder(tmp_path_factory):
    """A random CLIP of transformers with its processor, as PickScore's folder."""
    folder, tokenizer = tmp_path_factory.mktemp("pick"), tiny_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, **special, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    torch.manual_seed(0)
    vision = {**size, "image_size": 24, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def test_pickscore_is_the_published_formula_image_by_image(pick_folder):
    model, processor = CLIPModel.from_pretrained(pick_folder).eval(), CLIPProcessor.from_pretrained(pick_folder)
    expected = []
    for image, prompt in zip(random_images(4), PROMPTS, strict=True):
        pixels = processor(images=to_pil_image(image), return_tensors="pt")["pixel_values"]
        tokens = processor(text=prompt, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.no_grad():
            image_1D = model.visual_projection(model.vision_model(pixels).pooler_output)
            text_1D = model.text_projection(model.text_model(**tokens).pooler_output)
            cosine = torch.nn.functional.cosine_similarity(image_1D, text_1D)
            expected.append(model.logit_scale.exp() * cosine)
    scores = PickScore(pick_folder, pick_folder)(random_images(4), PROMPTS)
    assert scores.dtype == torch.float32 and scores.std() > 0.01
    torch.testing.assert_close(scores, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.fixture
def evaluated(leave, tiny_model, tmp_path, pick_folder, tiny_clip_folder):
    """A finished evaluation at two numbers of steps with PickScore, and a model of open_clip in HPSv2's place."""
    pick, hps = "metrics.pickscore", "metrics.hpsv2"
    code, stderr = leave(
        *SMALL, *tiny_model, "curves.guidance=[1]", "eval.pictures=4", "+metric=[pickscore,hpsv2]",
        f"{pick}.model={pick_folder}", f"{pick}.processor={pick_folder}",
        f"{hps}.model=local-dir:{tiny_clip_folder}", f"{hps}.pretrained=null",
    )  # fmt: skip
    assert code == 0, stderr
    return tmp_path / "runs/evaluate"


def test_preferences_stand_beside_clip_with_paired_differences(evaluated, pick_folder, tiny_clip_folder):
    results = json.loads((evaluated / "evaluation.json").read_text())
    two, one = results["points"]
    files = {steps: sorted(evaluated.glob(f"images/*/steps-{steps}-*/*.png")) for steps in (1, 2)}
    images = {steps: torch.stack([pil_to_tensor(Image.open(file)) for file in files[steps]]) for steps in files}
    by_hand = {"pickscore": PickScore(pick_folder, pick_folder), "hpsv2": ClipScorer(f"local-dir:{tiny_clip_folder}")}
    for name, prefer in by_hand.items():
        for point in (one, two):
            expected = prefer(images[point["steps"]], results["shown"])
            np.testing.assert_allclose(point["metrics"][name]["per_prompt"], expected, rtol=1e-4, atol=1e-4)
        own, other = (np.array(point["metrics"][name]["per_prompt"]) for point in (one, two))
        assert two["metrics"][name]["versus_reference"] is None
        assert one["metrics"][name]["versus_reference"]["mean"] == pytest.approx((own - other).mean())
        assert one["metrics"][name]["se"] == pytest.approx(own.std(ddof=1) / 2)
    assert results["protocol"]["metrics"]["pickscore"]["model"] == pick_folder
    heading = (evaluated / "table.md").read_text().splitlines()[0]
    for column in ("pickscore ± se", "pickscore against the reference", "hpsv2 ± se"):
        assert column in heading and column in (evaluated / "report.html").read_text()
    assert "hpsv2.versus_reference.low" in (evaluated / "results.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["+metric=pickscore"],
            "PickScore: yuvalkirstain/PickScore_v1 or laion.*not in the hub cache.*give folders",
        ),
        (["+metric=hpsv2"], "metrics.hpsv2.pretrained"),
        (["+preference=hpsv2"], "evaluation.preferences.hpsv2.pretrained"),
        (["+preference=hpsv2", "evaluation.preferences.hpsv2.pretrained=/no/HPS.pt"], "no weights '/no/HPS.pt'; give"),
        (["+metric=imagereward"], "Available options in 'metric': fvd_i3d fvd_videomae"),
        (["+metric=beauty"], "Available options in 'metric': fvd_i3d fvd_videomae"),
        (["metrics=[pickscore]"], "must be a table, as \\+metric=NAME gives it"),
        (["evaluation.preferences=[pickscore]"], "must be a table, as \\+metric=NAME gives it"),
    ],
)
def test_what_cannot_be_had_ends_in_a_line_before_anything_is_drawn(overrides, expected, leave, tiny_model, tmp_path):
    assert re.search(expected, error_line(*leave(*SMALL, *tiny_model, *overrides)))
    assert not list(tmp_path.glob("runs/evaluate/*ed"))


def test_a_torn_folder_is_one_line_that_says_it_cannot_be_read(pick_folder, tmp_path):
    folder = shutil.copytree(pick_folder, tmp_path / "pick")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-20])
    with pytest.raises(ValueError, match="PickScore: .*pick or .* cannot be read: .*header"):
        PickScore(str(folder), str(folder))


def test_a_folder_that_is_no_clip_is_not_scored_with_random_weights(tiny_pipeline_folder, pick_folder):
    with pytest.raises(ValueError, match="PickScore"):
        PickScore(str(tiny_pipeline_folder / "text_encoder"), pick_folder)
