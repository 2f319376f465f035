"""Sizes that configurations say in other ways: a list, or nothing."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline

from slimstep.data.encoding import check_size
from slimstep.engine.quiet import quiet
from slimstep.eval.sampling import Sampler
from slimstep.models.pipeline import export_pipeline, load_pipeline
from slimstep.models.sizes import native_pixels, set_resolution
from tests.models.conftest import paint
from tests.tiny import small_pipeline, tiny_sdxl_pipeline

MAKERS = {"sd": small_pipeline, "sdxl": tiny_sdxl_pipeline}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sizes")
    with quiet():
        for name, make in MAKERS.items():
            make().save_pretrained(root / name)
    return root


@pytest.fixture
def sized(folders, tmp_path):
    """A copy of a model with another sample_size in UNet or VAE."""

    def make(name, **sizes):
        folder = shutil.copytree(folders / name, tmp_path / name, dirs_exist_ok=True)
        for part, size in sizes.items():
            config = folder / part / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": size}))
        return folder

    return make


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("sizes", [{"unet": [8, 8]}, {"vae": [16, 16]}, {"unet": None, "vae": [16, 16]}])
def test_a_square_said_otherwise_is_the_same_model(sized, folders, name, sizes):
    loaded, plain = load_pipeline(sized(name, **sizes)), load_pipeline(folders / name)
    assert native_pixels(loaded) == native_pixels(plain) == 16
    assert loaded.unet.config.sample_size == 8 and loaded.vae.config.sample_size == 16
    assert torch.equal(paint(loaded, height=None, width=None), paint(plain, height=None, width=None))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("sizes", [{"unet": [8, 16]}, {"unet": None, "vae": [16, 32]}, {"vae": [16, 32]}])
def test_a_model_of_rectangles_draws_the_square_that_it_is_asked_for(sized, folders, name, sizes):
    loaded = load_pipeline(sized(name, **sizes))
    if sizes.get("unet"):
        assert native_pixels(loaded) == "16x32"
    plain = load_pipeline(folders / name)
    for pipeline in (loaded, plain):
        set_resolution(pipeline, 32)
    images = paint(loaded, height=None, width=None)
    assert images.shape[-2:] == (32, 32) and torch.equal(images, paint(plain, height=None, width=None))


def test_rectangles_are_drawn_and_exported_where_the_stock_pipeline_takes_them(folders, tmp_path):
    pipeline, squares = (load_pipeline(folders / name) for name in MAKERS)
    with pytest.raises(ValueError, match="data.resolution=16x32: a StableDiffusionXLPipeline draws squares"):
        check_size(squares, 16, 32)
    check_size(pipeline, 16, 32)
    set_resolution(pipeline, "16x32")
    sampler = Sampler(pipeline, steps=2, guidance_scale=2.0)
    images = sampler.images(pipeline.unet, ["a b"], [0])
    export_pipeline(pipeline, tmp_path / "export")
    stock, options = DiffusionPipeline.from_pretrained(tmp_path / "export"), {"num_inference_steps": 2}
    drawn = stock("a b", guidance_scale=2.0, latents=sampler.noise(0)[None], output_type="np", **options).images
    assert images.shape == (1, 3, 16, 32) and stock("a b", output_type="np", **options).images.shape == (1, 16, 32, 3)
    assert (images.permute(0, 2, 3, 1) - 255 * torch.from_numpy(drawn)).abs().max() <= 0.51


@pytest.mark.parametrize("size", ["8", 0, -8, 8.5, True, [8], [8, 8, 8], ["8", "8"], {}])
def test_what_is_no_size_is_reported_by_its_file(sized, size):
    with pytest.raises(ValueError, match=r"unet/config.json has sample_size=.*a number or \[height, width\]"):
        load_pipeline(sized("sd", unet=size))


JOBS = {
    "latency_table": ["latency.iterations=2", "latency.additive_samples=1"],
    "evaluate": ["eval.prompts=2", "eval.steps=1", "eval.pictures=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_jobs_run_at_a_listed_size(sized, tiny_clip_folder, tmp_path, leave, job):
    def run(**sizes):
        model = [f"model.name_or_path={sized('sd', **sizes)}", f"scorer.model=local-dir:{tiny_clip_folder}"]
        model += ["scorer.force=true"]
        overrides = [*JOBS[job], "data.pairs.size=4"]
        return leave(f"+experiment={job}", "model=path", *model, *overrides, f"name={job}{len(str(sizes))}")

    for sizes in ({"unet": [8, 8]}, {"unet": None}, {"unet": [8, 16]}):
        assert run(**sizes)[0] == 0


def test_a_vae_of_no_size_is_an_error_that_says_what_to_write(sized):
    """Stock diffusers ends in a TypeError there."""
    with pytest.raises(ValueError, match="vae/config.json has sample_size=null, .*write its pixels"):
        load_pipeline(sized("sd", vae=None))
