"""Packages of videos, of what begins with a picture, and of samplers that clip or read a predicted variance."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.random_deepfloyd import small_if_pipeline, small_if_second_pipeline
from scripts.random_svd import small_svd_pipeline
from scripts.random_transformers import FIRST_FRAME, OF_15, small_cogvideox_pipeline, small_wan_pipeline
from slimstep.eval.packaging import run_package
from slimstep.eval.packaging.package import guidance_shares, package_of
from slimstep.eval.packaging.pictures import chosen
from slimstep.eval.packaging.sizes import sizes_from
from slimstep.eval.packaging.tokenization import tokenizations_of
from slimstep.eval.sampling import Sampler
from slimstep.models.first_frames import begins_with_frame, with_first_frames
from slimstep.models.pipeline import load_pipeline
from tests.packaged import PROMPT, drawn_alone, drawn_here, noises, packaged

KINDS = {
    "wan": small_wan_pipeline,
    "cogvideox_1_5": lambda: small_cogvideox_pipeline(**OF_15),
    "cogvideox_of_frames": lambda: small_cogvideox_pipeline(**FIRST_FRAME),
    "svd": lambda: small_svd_pipeline(levels=2),
    "deepfloyd": small_if_pipeline,
    "deepfloyd_second": small_if_second_pipeline,
}


def picture_options(sampler: Sampler, folder: Path) -> list[str]:
    """The words that give a package's program the picture that the sampler draws from."""
    words = []
    for option, array in zip(("--image", "--image-noise"), chosen(sampler, PROMPT), strict=True):
        np.save(file := folder / f"given{option}.npy", array.numpy())
        words += [option, str(file)]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_package_draws_what_its_pipeline_draws(kind, tmp_path):
    pytest.importorskip("onnxscript")
    loading = {}
    if kind == "deepfloyd_second":
        small_if_pipeline().save_pretrained(tmp_path / "first")
        loading["first_stage"] = {"path": str(tmp_path / "first"), "steps": 2, "guidance_scale": 3.0}
    sampler = packaged(KINDS[kind](), tmp_path, 3, 2.5, **loading)
    folder, words = tmp_path / "package", []
    manifest = json.loads((folder / "package.json").read_text())
    if begins_with_frame(sampler.pipeline):
        frame = torch.randint(256, (*manifest["picture"]["sides"], 3), dtype=torch.uint8)
        with_first_frames(sampler.pipeline, {PROMPT: frame})
    if manifest["picture"]:
        words = picture_options(sampler, tmp_path)
    found = drawn_alone(folder, noises(sampler, 2, manifest), *words, without=("torch",))
    expected = drawn_here(sampler, 2)
    assert np.abs(expected[0] - expected[1]).max() > 1e-2, "of other noise, another image"
    np.testing.assert_allclose(found, expected, atol=2e-4)
    with Image.open(folder / "image-0.png") as drawn:
        assert drawn.size == expected.shape[-2:][::-1]
        assert getattr(drawn, "n_frames", 1) == (expected.shape[2] if expected.ndim == 5 else 1)


def test_captions_reach_t5_as_the_pipeline_writes_them():
    (wan,), (deepfloyd,) = (tokenizations_of(make()) for make in (small_wan_pipeline, small_if_pipeline))
    assert (wan.lowers, wan.strips, wan.joins_spaces) == (False, True, True)
    assert deepfloyd.lowers and deepfloyd.strips
    said = {"lowers": True, "strips": True, "joins_spaces": False}
    assert run_package.written(" A  Dog ", said) == "a  dog"
    assert run_package.written(" A  Dog ", {**said, "lowers": False, "joins_spaces": True}) == "A Dog"


def test_guidance_grows_over_the_frames_of_stable_video_diffusion_alone(tmp_path):
    small_svd_pipeline(levels=2).save_pretrained(tmp_path / "svd")
    assert guidance_shares(Sampler(load_pipeline(tmp_path / "svd"), 1, 2.5)) == [0, 0.5, 1]
    small_wan_pipeline().save_pretrained(tmp_path / "wan")
    sampler = Sampler(load_pipeline(tmp_path / "wan"), 1, 2.5)
    assert guidance_shares(sampler) == []
    with pytest.raises(ValueError, match="package.sizes=16x32: a package of a WanPipeline has one size; leave it out"):
        package_of(sampler, [1], 1, [sizes_from("16x32")])


@pytest.fixture
def folder_of_frames(tmp_path) -> Path:
    """Of a package that begins with a picture of 4×8 pixels, as far as its program looks before it loads a graph."""
    picture = {"what": "a video's first frame", "sides": [4, 8], "noise": [3, 4, 8]}
    (tmp_path / "package.json").write_text(json.dumps({"format": "onnx", "frames_per_second": 7, "picture": picture}))
    return tmp_path


def test_pictures_are_fitted_and_others_are_refused(folder_of_frames):
    manifest = run_package.read_manifest(folder_of_frames)
    Image.new("RGB", (100, 20), (255, 0, 51)).save(file := folder_of_frames / "wide.png")
    asked = run_package.asked(["--image", str(file), "--seed", "3"])
    given = run_package.given_picture(asked, manifest)
    colour = np.broadcast_to(np.float32([1, -1, -0.6])[:, None, None], (1, 3, 4, 8))
    np.testing.assert_allclose(given["picture"], colour, atol=1e-6)
    assert given["picture_noise"].shape == (1, 3, 4, 8) and given["picture_noise"].std() > 0.5
    np.save(wrong := folder_of_frames / "wrong.npy", np.zeros((3, 8, 4)))
    for words, reason in ({
        (): "the package needs a video's first frame: --image FILE",
        ("--image", "absent.png"): "--image absent.png is not there",
        ("--image", str(wrong)): r"has the shape \(3, 8, 4\); it must be \(3, 4, 8\)",
        ("--image", str(file), "--image-noise", str(wrong)): "--image-noise .* has the shape",
    }).items():
        with pytest.raises(SystemExit, match=reason):
            run_package.given_picture(run_package.asked([*words]), manifest)
    with pytest.raises(SystemExit, match="begins with no picture"):
        run_package.given_picture(asked, {"picture": None})


def test_a_video_is_no_jpeg(folder_of_frames, monkeypatch):
    words = ["run_package.py", "--package", str(folder_of_frames), "--out", "video.jpg"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="--out video.jpg: a video is written as .webp, .gif, .png"):
        run_package.main()
