"""The CLIP score is open_clip's, and says which one."""

import json
import logging
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from slimstep.eval.metrics.clip import CLOSEST_MSE, PSNR_ROWS, ClipScorer, psnr
from tests.tiny import tiny_tokenizer

PROMPTS = ("a red circle", "a blue square above a green star", "two yellow triangles", "a small red star")


def random_images(n: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(n)).to(torch.uint8)


@pytest.fixture(scope="session")
def scorer(tiny_clip_folder):
    return ClipScorer(f"local-dir:{tiny_clip_folder}")


@pytest.mark.parametrize("height, width", [(24, 24), (64, 64), (40, 30), (17, 50)])
def test_preprocessing_is_open_clips_own(scorer, tiny_clip_folder, height, width):
    _, _, preprocess_val = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip_folder}")
    images = random_images(3, height, width)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    assert torch.equal(scorer.prepare(images), torch.stack([preprocess_val(picture) for picture in pictures]))


def test_the_score_is_open_clip_called_by_hand(scorer, tiny_clip_folder):
    model, _, preprocess_val = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip_folder}")
    images = random_images(4, 32, 32)
    with torch.no_grad():
        inputs = torch.stack([preprocess_val(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images])
        features = model.eval().encode_image(inputs)
        texts = model.encode_text(open_clip.get_tokenizer(f"local-dir:{tiny_clip_folder}")(list(PROMPTS)))
        expected = 100 * torch.nn.functional.cosine_similarity(features, texts)
    torch.testing.assert_close(scorer.score(images, scorer.text(PROMPTS)), expected, rtol=0, atol=1e-4)


def test_the_prefix_goes_before_every_prompt_and_the_scale_on_every_score(scorer, tiny_clip_folder):
    other = ClipScorer(f"local-dir:{tiny_clip_folder}", prefix="A photo of ", scale=1.0)
    texts = scorer.text([f"A photo of {prompt}" for prompt in PROMPTS])
    assert torch.equal(other.text(PROMPTS), texts)
    images = random_images(4, 24, 24)
    torch.testing.assert_close(100 * other.score(images, texts), scorer.score(images, texts))


def test_many_images_score_as_few_do(scorer):
    images = random_images(70, 24, 24)  # more than one batch
    texts = scorer.text(PROMPTS * 18)[:70]
    alone = torch.cat([scorer.score(images[i : i + 1], texts[i : i + 1]) for i in range(70)])
    torch.testing.assert_close(scorer.score(images, texts), alone, rtol=0, atol=1e-4)


def test_the_protocol_names_what_makes_the_metric(scorer, tiny_clip_folder):
    assert scorer.protocol == {
        "model": f"local-dir:{tiny_clip_folder.name}",
        "pretrained": None,
        "weights": scorer.protocol["weights"],
        "prefix": "",
        "resize": {"size": [24, 24], "mode": "shortest", "interpolation": "bicubic"},
        "scale": 100.0,
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
    }
    assert len(scorer.protocol["weights"]) == 12


def test_equal_images_are_as_close_as_eight_bits_tell():
    images = random_images(3, 24, 24)
    torch.testing.assert_close(psnr(images, images), (10 * torch.log10(torch.tensor(255**2 / CLOSEST_MSE))).expand(3))


def test_psnr_of_many_images_is_that_of_each():
    one, other = torch.randint(256, (2, 2 * PSNR_ROWS + 1, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(psnr(one, other), torch.cat([psnr(a[None], b[None]) for a, b in zip(one, other, strict=True)]))


def test_psnr_of_a_known_error():
    images = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    assert psnr(images + 10, images).item() == pytest.approx(28.13, abs=0.01)  # 20 log10(255 / 10)
    assert psnr(images, images + 10).item() == pytest.approx(28.13, abs=0.01)  # unsigned arithmetic would wrap


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": "ViT-B-33"}, "no model 'ViT-B-33'; close names: ViT-B-32"),
        ({"model": "ViT-B-32"}, "no weights None; give a checkpoint file or one of openai"),
        ({"model": "ViT-B-32", "pretrained": "laion3b"}, "no weights 'laion3b'"),
        ({"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}, "not in the cache .* run python -c"),
        ({"model": "local-dir:/no/such/folder"}, "no open_clip model in /no/such/folder"),
    ],
)
def test_weights_that_cannot_be_had_are_one_clear_line(monkeypatch, tmp_path, arguments, message):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=message) as error:
        ClipScorer(**arguments)
    assert "\n" not in str(error.value)


def test_a_folder_without_weights_is_not_scored_with_random_ones(tiny_clip_folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((tiny_clip_folder / "open_clip_config.json").read_text())
    with pytest.raises(ValueError, match=f"could not load local-dir:{tmp_path}"):
        ClipScorer(f"local-dir:{tmp_path}")


DAMAGES = {
    "torn": (lambda file: file.write_bytes(file.read_bytes()[:-20]), "Error while deserializing header"),
    "empty": (lambda file: file.write_bytes(b""), "Error while deserializing header"),
    "without weights": (lambda file: save_file({}, file), "it holds no weights"),
    "renamed": (lambda file: save_file({f"my.{key}": value for key, value in load_file(file).items()}, file),
                'Missing key.*"positional_embedding"'),
    "half": (lambda file: save_file(dict(list(load_file(file).items())[1:]), file), 'Missing key.*"ln_final.bias"'),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_scorer_is_one_short_line_that_names_file_and_key(tiny_clip_folder, tmp_path, case):
    damage, message = DAMAGES[case]
    folder = shutil.copytree(tiny_clip_folder, tmp_path / "clip")
    damage(folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=f"could not load .*open_clip_model.safetensors: .*{message}") as error:
        ClipScorer(f"local-dir:{folder}")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700 + len(str(folder))


@pytest.mark.parametrize("text", ["[]", "null", "{", "{}", '{"model_cfg": []}', '{"model_cfg": {"embed_dim": 16}}', ""])
def test_a_scorers_configuration_that_is_none_is_named(tiny_clip_folder, tmp_path, text):
    folder = shutil.copytree(tiny_clip_folder, tmp_path / "clip")
    (folder / "open_clip_config.json").write_text(text)
    with pytest.raises(ValueError, match="clip/open_clip_config.json describes no model"):
        ClipScorer(f"local-dir:{folder}")


def test_a_scorers_tokenizer_of_more_words_than_it_knows_is_refused(tiny_clip_folder, tmp_path):
    folder = shutil.copytree(tiny_clip_folder, tmp_path / "clip")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"vocab_size": len(tokenizer), "hf_tokenizer_name": str(folder)}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["token_embedding.weight"] = weights["token_embedding.weight"][: len(tokenizer)].clone()
    save_file(weights, folder / "open_clip_model.safetensors")
    ClipScorer(f"local-dir:{folder}")
    tokenizer.add_tokens(["photograph"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="gives tokens up to 55, and its open_clip_config.json has a vocab_size of 55"):
        ClipScorer(f"local-dir:{folder}")


def test_open_clip_says_nothing_on_the_root_logger(tiny_clip_folder, caplog):
    before = (logging.getLogger().level, list(logging.getLogger().handlers))
    ClipScorer(f"local-dir:{tiny_clip_folder}")
    assert not caplog.records
    assert (logging.getLogger().level, logging.getLogger().handlers) == before


def test_every_tag_has_the_activation_of_its_own_entry(monkeypatch):
    """27 of open_clip 3.3.0's pairs are QuickGELU weights under a name whose configuration has another activation."""
    requested = {}

    def note(model, pretrained, quick_gelu, force_quick_gelu, **options):
        assert quick_gelu == force_quick_gelu and "force_preprocess_cfg" not in options
        requested[model, pretrained] = quick_gelu
        raise RuntimeError("no weights here")

    monkeypatch.setattr(open_clip, "create_model", note)
    for model, tag in open_clip.list_pretrained():
        with pytest.raises(ValueError, match="could not be fetched"):
            ClipScorer(model, tag)
    trained = {pair for pair in requested if open_clip.get_pretrained_cfg(*pair).get("quick_gelu")}
    assert requested["ViT-B-32", "openai"] and not requested["ViT-B-32", "laion2b_s34b_b79k"]
    assert trained <= {pair for pair, quick in requested.items() if quick} and len(trained) > 40


@pytest.fixture
def published(monkeypatch, tiny_clip_folder):
    """publish(quick_gelu, {tag: its entry}): a tiny model under a name of open_clip's, as the bundled ones have it."""

    def publish(quick_gelu: bool, tags: dict[str, dict]) -> tuple[str, str]:
        config = json.loads((tiny_clip_folder / "open_clip_config.json").read_text())["model_cfg"]
        entry = {"mean": open_clip.constants.OPENAI_DATASET_MEAN, "std": open_clip.constants.OPENAI_DATASET_STD,
                 "interpolation": "bicubic", "resize_mode": "shortest"}  # fmt: skip
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config | {"quick_gelu": quick_gelu})
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {tag: entry | own for tag, own in tags.items()})
        return "tiny", str(tiny_clip_folder / "open_clip_model.safetensors")

    return publish


def by_hand(tiny_clip_folder, quick_gelu: bool, mean: tuple, std: tuple, images) -> torch.Tensor:
    config = json.loads((tiny_clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    model = open_clip.CLIP(**config | {"quick_gelu": quick_gelu}).eval()
    model.load_state_dict(load_file(tiny_clip_folder / "open_clip_model.safetensors"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    with torch.no_grad():
        return torch.nn.functional.normalize(model.encode_image((images / 255 - mean) / std), dim=-1)


HALF = (0.5, 0.5, 0.5)
OPENAI = open_clip.constants.OPENAI_DATASET_MEAN, open_clip.constants.OPENAI_DATASET_STD
QUICK, INCEPTION = {"quick_gelu": True}, {"mean": HALF, "std": HALF}


@pytest.mark.parametrize(
    ("configured", "tags", "given", "quick", "statistics"),
    [
        (False, {"a": {}}, {}, False, OPENAI),
        (False, {"a": QUICK, "b": QUICK}, {}, True, OPENAI),
        (True, {"a": {}}, {}, True, OPENAI),
        (False, {"a": QUICK | INCEPTION}, {}, True, (HALF, HALF)),
        (False, {"a": QUICK, "b": {}}, {"quick_gelu": True}, True, OPENAI),
        (False, {"a": QUICK, "b": {}}, {"quick_gelu": False}, False, OPENAI),
        (True, {"a": {}}, {"quick_gelu": False}, False, OPENAI),
        (False, {"a": {}, "b": INCEPTION}, {"normalisation": "inception"}, False, (HALF, HALF)),
        (False, {"a": {}, "b": INCEPTION}, {"normalisation": "openai"}, False, OPENAI),
        (False, {"a": INCEPTION}, {"normalisation": "none"}, False, ((0, 0, 0), (1, 1, 1))),
        (False, {}, {"normalisation": "openai"}, False, OPENAI),
        (True, {}, {"normalisation": "inception"}, True, (HALF, HALF)),
    ],
)
def test_a_checkpoint_file_is_the_network_its_tags_say(
    published, tiny_clip_folder, configured, tags, given, quick, statistics
):
    scorer = ClipScorer(*published(configured, tags), **given)
    images = random_images(3, 32, 32)
    size = scorer.protocol["resize"]["size"]
    images = torch.nn.functional.interpolate(images, size)
    expected = by_hand(tiny_clip_folder, quick, *statistics, images)
    torch.testing.assert_close(scorer.image(images), expected, rtol=0, atol=1e-5)
    for other in ((not quick, *statistics), (quick, HALF, OPENAI[1])):
        assert (by_hand(tiny_clip_folder, *other, images) - expected).abs().max() > 3e-4
    assert scorer.protocol.get("quick_gelu", configured) == quick
    assert (scorer.protocol["mean"], scorer.protocol["std"]) == tuple(map(list, statistics))


@pytest.mark.parametrize(
    ("tags", "given", "words"),
    [
        ({"a": QUICK, "b": {}}, {}, r"give scorer.quick_gelu=true or false \("),
        ({"a": {}, "b": INCEPTION}, {}, r"give scorer.normalisation=openai, imagenet, inception, none \("),
        ({"a": {}, "b": INCEPTION | QUICK}, {}, r"give scorer.quick_gelu=true or false and scorer.normalisation="),
        ({}, {}, r"give scorer.normalisation=openai"),
        ({"a": {}}, {"normalisation": "clip"}, "scorer.normalisation=clip is unknown; choose from openai, imagenet,"),
    ],
)
def test_what_a_name_leaves_open_is_asked_for(published, tags, given, words):
    with pytest.raises(ValueError, match=words):
        ClipScorer(*published(False, tags), **given)


def test_what_is_given_may_not_contradict_a_folder(tiny_clip_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_clip_folder, tmp_path / "clip"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= INCEPTION
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    same = ClipScorer(f"local-dir:{folder}", quick_gelu=False, normalisation="inception")
    assert same.protocol == ClipScorer(f"local-dir:{folder}").protocol
    for given in ({"quick_gelu": True}, {"normalisation": "openai"}):
        (words,) = (f"scorer.{name}={value}" for name, value in given.items())
        with pytest.raises(ValueError, match=rf"^{words} \(or a preference's own\): local-dir:.* says otherwise"):
            ClipScorer(f"local-dir:{folder}", **given)
