"""A teacher and its students side by side: what is shown, that all start from one noise, and the page in a browser."""

import re
import shutil

import pytest
import torch

from slimstep.commands.compare import main
from slimstep.eval.sampling import Sampler
from slimstep.eval.serving import serve  # without Gradio, too: it is in no environment of the tests
from slimstep.eval.side_by_side import side_models
from slimstep.models.networks import network_of
from slimstep.models.pipeline import load_pipeline
from tests.distill.test_steps_job import run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("runs")
    done = run(*tiny_model, f"root={root}", "objective=guidance", "distillation.steps=[4,2,1]")
    assert done.returncode == 0, done.stderr
    return root / "distill_steps"


def test_a_run_shows_its_teacher_and_all_its_students_as_they_are_sampled(distilled, tiny_pipeline_folder):
    teacher, two, one = side_models([distilled])
    assert (teacher.name, teacher.steps, teacher.guidance_scale) == ("teacher", 4, 2.5)
    assert teacher.path == str(tiny_pipeline_folder)
    assert [(m.name, m.steps, m.guidance_scale) for m in (two, one)] == [
        ("distill_steps steps-2", 2, 2.5), ("distill_steps steps-1", 1, 2.5)
    ]  # fmt: skip
    assert side_models([distilled / "steps-1/export"]) == [teacher, one]


def test_every_model_draws_what_an_evaluation_would_from_the_noise_of_the_seed(distilled):
    for model in side_models([distilled]):
        image, seconds = model.draw("a red circle", 3)
        pipeline = load_pipeline(model.path)
        sampler = Sampler(pipeline, model.steps, model.guidance_scale, seed=3)
        assert torch.equal(image, sampler.images(network_of(pipeline), ["a red circle"], [0])[0]) and seconds > 0
        assert not torch.equal(image, model.draw("a red circle", 4)[0])


def test_what_cannot_be_shown_is_named(distilled, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr("sys.argv", ["slimstep compare", str(tmp_path), "--serve"])
    assert main() == 1 and "holds no export of slimstep's" in capsys.readouterr().err


def test_without_gradio_the_way_out_is_named(distilled, capsys, monkeypatch):
    monkeypatch.setattr("slimstep.commands.compare.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["slimstep compare", str(distilled), "--serve"])
    assert main() == 1 and "pip install 'slimstep[serve]'" in capsys.readouterr().err


@pytest.mark.skipif(not BROWSER, reason="no Chromium here: apt-get install chromium")
def test_a_prompt_is_typed_and_all_models_answer(distilled):
    sync_api = pytest.importorskip("playwright.sync_api")
    gradio = pytest.importorskip("gradio")
    models = side_models([distilled])
    address = serve(models, None, is_waiting=False)
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(address)
            page.get_by_label("Prompt").fill("a red circle")
            page.keyboard.press("Enter")
            page.get_by_text(re.compile(r"steps-1: 1 step, guidance 2.5, \d+ ms, [\d.]+ times as fast")).wait_for()
            assert page.locator("img[src*='file=']").count() == len(models)
            assert page.get_by_text(re.compile(r"teacher: 4 steps, guidance 2.5, \d+ ms$")).count()
            browser.close()
    finally:
        gradio.close_all()
