"""Videos in reports: kept as they were drawn, beside each other on a page of one file, still until they are played."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from slimstep.data.shapes_video import ShapesVideoPairs
from slimstep.eval.evaluator import picture, write_pictures
from slimstep.eval.pages.evaluation_page import models_table, write_evaluation_report
from slimstep.eval.pages.steps_page import TimedPoint, points_table
from slimstep.eval.pages.videos import PICTURE, videos_of
from slimstep.eval.record import Evaluation, Point
from tests.eval.run_stub import write

PROMPTS = ("a red circle moves left", "a <blue> square & more")
PAIRS = ShapesVideoPairs(resolution=16, frames=5)
VIDEOS = torch.stack([PAIRS[i]["video"] for i in range(2)])


def frames_of(image: Image.Image) -> np.ndarray:
    return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def point(model: str, ratio: dict | None = None) -> Point:
    score = {"kind": "per_image", "mean": 3.0, "se": 0.1, "per_prompt": [3.0, 3.0], "versus_reference": None}
    moved = {**score, "compared_by_ratio": True, "ratio_to_reference": ratio}
    distance = {"kind": "distribution", "fvd": 12.5, "features": "I3D"}
    return Point(model, 4, 2.5, {"clip": score, "motion": moved, "fvd_i3d": distance}, {"guidance_scale": 2.5})


def evaluation(*points: Point) -> Evaluation:
    reference = {"model": "teacher", "steps": 4}
    return Evaluation({p.model: p.model for p in points}, reference, "prompts", "0" * 12, 2, PROMPTS, {}, points, {})


@pytest.fixture
def run(tmp_path):
    """A finished evaluation of two models with videos of two prompts."""
    points = point("teacher"), point("student", {"ratio": 0.5, "low": 0.4, "high": 0.6, "n": 2})
    write(tmp_path / "evaluation.json", evaluation(*points).as_json())
    for model in ("teacher", "student"):
        folder = tmp_path / f"images/{model}/steps-4-guidance-2.5"
        folder.mkdir(parents=True)
        write_pictures(VIDEOS if model == "teacher" else VIDEOS.flip(1), folder)
    return tmp_path


class Page(HTMLParser):
    """The elements of a page by their names, with their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def of(self, tag: str, kind: str | None = None) -> list[dict]:
        return [own for name, own in self.found if name == tag and (kind is None or own.get("class") == kind)]


def decoded(element: dict) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(element["src"].partition("base64,")[2])))


def test_the_table_of_a_distillation_says_how_much_its_students_move():
    over = {"ratio": 0.5, "low": 0.4, "high": 0.6, "n": 2}
    points = [TimedPoint(**{**vars(point(name, own)), "facts": {"evaluations": 8}}, unet_ms=3.0)
              for name, own in (("teacher", None), ("steps-4", over))]  # fmt: skip
    table = points_table(points)
    column = table.header.index("motion over the reference's")
    assert [row[column] for row in table.rows] == ["–", "0.50 [0.40, 0.60]"]


def test_a_small_video_is_kept_without_loss(run):
    with Image.open(run / "images/teacher/steps-4-guidance-2.5/001.webp") as kept:
        assert (frames_of(kept) == VIDEOS[1].numpy()).all()


def test_a_large_video_keeps_all_its_frames_nearly(tmp_path):
    big = VIDEOS[:1].repeat_interleave(20, 2).repeat_interleave(20, 3)
    write_pictures(big, tmp_path)
    with Image.open(tmp_path / "000.webp") as kept:
        error = np.abs(frames_of(kept).astype(int) - big[0].numpy())
    assert error.mean() < 4


def test_the_picture_of_a_video_is_a_row_of_frames_with_the_first_and_the_last():
    long = torch.arange(25, dtype=torch.uint8)[:, None, None, None].expand(25, 2, 2, 3).contiguous()
    row = np.asarray(picture(long))
    assert row.shape == (2, 9 * 2, 3) and row[0, ::2, 0].tolist() == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert picture(VIDEOS[0]).size == (5 * 16, 16) and picture(torch.zeros(3, 4, 6, dtype=torch.uint8)).size == (6, 4)


def test_a_page_shows_models_beside_each_other_still_at_first_and_without_a_script(run):
    text = write_evaluation_report(run).read_text()
    page = Page(text[text.index('<section class="videos">') : text.index("</main>")])
    still, moving, boxes = page.of("img", "still"), page.of("img", "moving"), page.of("input")
    assert len(still) == len(moving) == 4 and len(boxes) == 5  # one plays all
    assert all(box["type"] == "checkbox" and "checked" not in box for box in boxes) and not page.of("script")
    for n, (first, all_frames) in enumerate(zip(still, moving, strict=True)):
        video = VIDEOS[n % 2] if n < 2 else VIDEOS[n % 2].flip(0)  # the teacher's row is the first
        frames = frames_of(decoded(all_frames))
        assert frames.shape == (5, PICTURE, PICTURE, 3) and decoded(first).n_frames == 1
        for shown, drawn in ((frames, video), (frames_of(decoded(first)), video[:1])):
            near = drawn.numpy().astype(int).repeat(PICTURE // 16, 1).repeat(PICTURE // 16, 2)
            assert np.abs(shown - near).mean() < 8


def test_videos_have_alternative_texts_that_say_prompt_and_model(run):
    text = write_evaluation_report(run).read_text()
    alts = [own["alt"] for own in Page(text).of("img", "moving")]
    assert alts[1] == f"{PROMPTS[1]}, drawn by teacher, 4 steps, guidance 2.5" and "student" in alts[2]
    assert [own["alt"] for own in Page(text).of("img", "still")] == [f"{alt}: the first frame" for alt in alts]
    assert "<blue>" not in text


def test_hidden_is_what_a_box_that_is_not_checked_hides(run):
    rules = re.sub(r"\s+", " ", write_evaluation_report(run).read_text())
    assert ".play .moving, .all:checked ~ table .still, .play input:checked ~ .still { display: none; }" in rules


def test_images_make_no_section_of_videos(tmp_path):
    write(tmp_path / "evaluation.json", (made := evaluation(point("teacher"))).as_json())
    folder = tmp_path / "images/teacher/steps-4-guidance-2.5"
    folder.mkdir(parents=True)
    write_pictures(VIDEOS[:, 0].movedim(-1, 1), folder)
    assert videos_of(tmp_path, made) is None
    page = Page(write_evaluation_report(tmp_path).read_text())
    assert not page.of("section", "videos") and not list(folder.glob("*.webp"))


def test_the_table_has_the_ratio_of_motion_and_the_video_distance():
    points = point("teacher"), point("student", {"ratio": 0.5, "low": 0.4, "high": 0.6, "n": 2})
    table = models_table(points)
    at = table.header.index("motion over the reference's")
    assert table.rows[0][at] == "–" and "0.50" in table.rows[1][at]
    assert table.rows[1][table.header.index("FVD")] == "12.50"
