"""A scorer that cannot evaluate the data ends a job before anything is trained, unless it is forced to go on."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from PIL import Image

from slimstep.data.prompts import PromptSet
from slimstep.engine.run import Run
from slimstep.eval import scorer_check
from slimstep.eval.pages.cautions import cautions, is_above_chance
from slimstep.eval.plan import scorer_stage
from slimstep.eval.scorer_check import against_shuffled, check_scorer, compare_teacher, shuffles
from tests.user_errors import error_line

WIDTH = 64
TEXTS = [f"thing {k}" for k in range(200)]


class Features:
    """Scores of features that a test makes itself."""

    protocol = {"model": "made by hand"}

    def similarity(self, image_BD, text_BD):
        return 100 * (image_BD * text_BD).sum(1)


def drawn(texts, seed, kinship=0.0, noise=1.0):
    """Unit features of images and texts: those of one text lie together, and near the text with `kinship` alone."""
    draw = torch.Generator().manual_seed(seed)
    distinct = {text: torch.randn(2, WIDTH, generator=draw) for text in dict.fromkeys(texts)}
    text_ND = torch.stack([distinct[text][0] for text in texts])
    own_ND = torch.stack([distinct[text][1] for text in texts])
    image_ND = kinship * text_ND + own_ND + noise * torch.randn(len(texts), WIDTH, generator=draw)
    return [torch.nn.functional.normalize(x, dim=1) for x in (image_ND, text_ND)]


def compared(texts, *features):
    return against_shuffled(*drawn(texts, *features), texts, Features())


# ---- shuffling ----


@pytest.mark.parametrize("counts", [[1, 1], [1] * 9, [5, 5], [3, 1, 2, 1], [9, 1, 1], [2, 7, 4, 30], [50, 1]])
def test_no_image_meets_its_own_caption_and_every_caption_is_used_as_often(counts):
    texts = [f"text {k}" for k, count in enumerate(counts) for _ in range(count)]
    random.Random(0).shuffle(texts)
    order, others = shuffles(texts)
    assert others and len(set(order)) == len(order)
    for other in others:
        assert sorted(other) == sorted(order)
        assert all(texts[i] != texts[j] for i, j in zip(order, other, strict=True))
    assert len(order) == len(texts) - max(0, 2 * max(counts) - len(texts))  # left out as few as it takes


def test_captions_that_differ_in_case_and_spaces_are_one():
    assert shuffles(["A  cat", "a cat", " a CAT "]) == ([], [])
    _, (first, *_) = shuffles(["A cat", "a cat", "a dog", "a  dog"])
    assert first == [2, 3, 0, 1]


# ---- the criterion ----


def test_a_scorer_that_knows_the_captions_is_above_chance_and_one_that_does_not_is_not():
    assert is_above_chance(compared(TEXTS, 0, 1.0))
    assert not is_above_chance(compared(TEXTS, 0, 0.0))


def test_alike_images_of_few_captions_are_no_more_evidence_than_few():
    """Ten captions with many alike images each: errors that counted images would take chance for knowledge."""
    texts = [f"digit {k % 10}" for k in range(250)]
    order, (other, *_) = shuffles(texts, 1)

    def by_image(seed):
        image_ND, text_ND = drawn(texts, seed, 0.0, 0.3)
        difference_N = (image_ND[order] * (text_ND[order] - text_ND[other])).sum(1)
        return difference_N.mean() / difference_N.std() * len(order) ** 0.5

    assert sum(by_image(seed) > 2.34 for seed in range(100)) > 20  # of 1 that the 99 % point allows
    assert sum(is_above_chance(compared(texts, seed, 0.0, 0.3)) for seed in range(100)) <= 3
    assert is_above_chance(compared(texts, 0, 1.0, 0.3))


def test_a_difference_that_is_real_and_too_small_to_rank_by_is_not_enough():
    record = compared([f"thing {k}" for k in range(2000)], 0, 0.06)
    assert record["difference"]["mean"] > 4 * record["difference"]["se"] and 0.5 < record["prefer_own"] < 0.6
    assert not is_above_chance(record)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_scorer_that_gives_all_images_one_score_is_at_chance(value):
    same = torch.full((6, WIDTH), value)
    record = against_shuffled(same, same, TEXTS[:6], Features())
    assert record["prefer_own"] == 0.5 and not is_above_chance(record)


def test_scores_that_are_not_finite_are_an_error():
    image, text = drawn(TEXTS[:4], 0)
    with pytest.raises(ValueError, match="made by hand gives scores that are not finite"):
        against_shuffled(image / 0, text, TEXTS[:4], Features())


def test_one_caption_cannot_be_shuffled():
    assert compared(["a cat"] * 5, 0) is None


def test_a_teacher_at_chance_is_reported_with_the_way_out(caplog, monkeypatch):
    scorer = Features()
    image_ND, text_ND = drawn(TEXTS[:20], 0)
    scorer.text = lambda texts: text_ND[: len(texts)]
    prompts = PromptSet(tuple(TEXTS[:20]), "twenty")
    def record(features_ND):
        return compare_teacher(features_ND.__getitem__, prompts, scorer, Accelerator(cpu=True))

    assert not is_above_chance(record(image_ND))
    assert "the teacher is at chance" in caplog.text and "more eval.prompts, another scorer" in caplog.text
    caplog.clear()
    assert is_above_chance(record(text_ND)) and not caplog.text


# ---- in a run ----


@pytest.fixture
def job(tmp_path):
    """A job on 24 drawn images whose scorer reads their mean colour: it knows them, or with `knows` false nothing."""
    pairs = {"_target_": "slimstep.data.shapes.ShapesPairs", "split": "train", "size": 24, "resolution": 8}
    scorer = SimpleNamespace(protocol={"model": "colours"}, force=False, knows=True, similarity=Features().similarity)
    features = drawn(TEXTS, 1)[1]
    drawn_so_far = {}

    def image(images):
        numbers = [drawn_so_far.setdefault(image.numpy().tobytes(), len(drawn_so_far)) for image in images]
        return features[[number if scorer.knows else -1 - number for number in numbers]]

    scorer.image, scorer.text = image, lambda texts: features[: len(texts)]
    config = OmegaConf.create({"data": {"pairs": pairs, "prompt_file": None}})
    return SimpleNamespace(run=Run(tmp_path / "run", Accelerator(cpu=True)), config=config, scorer=scorer)


def made(job):
    file = job.run.path / "scorer_check.json"
    return json.loads(file.read_text()) if file.exists() else None


def test_a_scorer_that_knows_the_data_passes_and_says_so_once(job, caplog, monkeypatch):
    caplog.set_level("INFO", "slimstep")
    check_scorer(job.config, job.run, job.scorer)
    assert made(job)["prefer_own"] > 0.95 and "the scorer knows these data" in caplog.text
    monkeypatch.setattr(scorer_check, "measured", lambda *_: pytest.fail("a resumed run measures again"))
    caplog.clear()
    check_scorer(job.config, job.run, job.scorer)
    assert not caplog.text and not cautions(job.run.path)


def test_one_that_does_not_ends_the_run_in_one_line_and_leaves_nothing(job):
    job.scorer.knows = False
    with pytest.raises(ValueError, match=r"^the scorer colours cannot evaluate these .*scorer=openclip.*force=true"):
        check_scorer(job.config, job.run, job.scorer)
    assert not job.run.path.exists()


def test_a_forced_run_goes_on_with_the_sentence_and_stops_again_without_the_word(job, caplog):
    job.scorer.knows, job.scorer.force = False, True
    check_scorer(job.config, job.run, job.scorer)
    (sentence,) = cautions(job.run.path)
    assert sentence.startswith("the scorer colours cannot evaluate these data") and sentence in caplog.text
    job.scorer.force = False
    with pytest.raises(ValueError, match="cannot evaluate these data"):
        check_scorer(job.config, job.run, job.scorer)


@pytest.mark.parametrize("other", ["scorer", "data"])
def test_another_scorer_or_other_data_are_measured_anew(job, other):
    check_scorer(job.config, job.run, job.scorer)
    if other == "scorer":
        job.scorer.protocol = {"model": "shapes"}
    else:
        job.config.data.pairs.size = 12
    job.scorer.knows = False
    with pytest.raises(ValueError, match="cannot evaluate these data"):
        check_scorer(job.config, job.run, job.scorer)


def test_a_finished_run_is_left_alone(job):
    job.scorer.knows = False
    job.run.path.mkdir()
    (job.run.path / "report.html").write_text("done")
    check_scorer(job.config, job.run, job.scorer)
    assert made(job) is None


def test_prompts_without_images_are_reported_and_not_measured(job, caplog):
    caplog.set_level("INFO", "slimstep")
    job.config.data.prompt_file, job.scorer.knows = "prompts.txt", False
    check_scorer(job.config, job.run, job.scorer, has_images=False)
    assert "not known before images are drawn: prompts.txt has prompts alone" in caplog.text
    assert not cautions(job.run.path)


def test_data_of_one_caption_are_reported_on_the_page_too(job, monkeypatch, caplog):
    monkeypatch.setattr(
        scorer_check, "own_images", lambda *_: ([torch.zeros(3, 8, 8, dtype=torch.uint8)] * 3, ["x"] * 3)
    )
    check_scorer(job.config, job.run, job.scorer)
    assert cautions(job.run.path) == [
        "whether the scorer can evaluate these data is not known: all 3 images have one caption"]  # fmt: skip
    assert cautions(job.run.path)[0] in caplog.text


@pytest.mark.parametrize("count", [1, 2, 3])  # of either split
def test_of_few_captions_nothing_can_be_said_and_the_run_goes_on(count, job, caplog):
    job.config.data.pairs.size, job.scorer.knows = count, False
    check_scorer(job.config, job.run, job.scorer)
    (sentence,) = cautions(job.run.path)
    assert "is not known" in sentence and "captions" in sentence and sentence in caplog.text


def test_a_plan_names_the_check_unless_the_run_is_finished(job):
    assert [stage.artifact for stage in scorer_stage(job.run)] == ["scorer_check.json"]
    job.run.path.mkdir()
    (job.run.path / "report.html").write_text("done")
    assert scorer_stage(job.run) == []


# ---- the jobs ----


@pytest.fixture(scope="module")
def own_images(tmp_path_factory):
    """Forty pictures of stripes, captioned by words that no scorer of shapes knows; one cannot be read."""
    folder, draw = tmp_path_factory.mktemp("stripes"), random.Random(0)
    for k in range(40):
        image = Image.new("RGB", (32, 32), tuple(draw.randrange(256) for _ in range(3)))
        image.paste(tuple(draw.randrange(256) for _ in range(3)), (0, draw.randrange(16), 32, draw.randrange(16, 32)))
        image.save(folder / f"{k}.png")
        word = "".join(draw.choice("bcdfghklmnprst") + draw.choice("aeiou") for _ in range(3))
        (folder / f"{k}.txt").write_text(f"an etching of {word}")
    (folder / "7.png").write_bytes(b"torn")
    return folder


JOBS = {
    "prune_unet": [],
    "distill_steps": [],
    "prune_vae": ["latents.prompts=8"],
    "evaluate": ["eval.prompts=4", "eval.pictures=2"],
}


def test_images_are_those_of_training_where_none_is_held_out(job, own_images):
    pairs = {"_target_": "slimstep.data.images.ImageFolderPairs", "root": str(own_images), "split": "train"}
    pairs["resolution"] = 16
    for fraction, readable in ((0, 39), (0.3, 39), (0.999999, 39)):
        job.config.data.pairs = {**pairs, "heldout_fraction": fraction, "max_broken": 1}
        images, captions = scorer_check.own_images(job.config, 64)
        assert len(images) == len(captions) == readable, fraction
    assert len(scorer_check.own_images(job.config, 8)[0]) == 8


@pytest.mark.parametrize("job", JOBS)
def test_every_job_that_scores_stops_before_it_makes_anything(job, own_images, leave, tmp_path):
    data = ["data=imagefolder", f"data.root={own_images}", "data.heldout_fraction=0.3", f"root={tmp_path / 'runs'}"]
    code, said = leave(f"+experiment={job}", *data, "model=shapes", "scorer=shapes", *JOBS[job])
    assert "the scorer local-dir:shapes-clip cannot evaluate these data: 39 images" in error_line(code, said)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())
