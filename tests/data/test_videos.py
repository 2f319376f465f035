"""Videos with captions: what of them is taken, as files, as frames and from tars; and what becomes of broken ones."""

import builtins
import io
import json
import logging
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from slimstep.data.frames import Clip, at_rate, check_pyav, in_order
from slimstep.data.images import is_held_out
from slimstep.data.pixels import BrokenImageError, cut_out
from slimstep.data.prompts import heldout_prompts
from slimstep.data.videos import VideoFolderPairs, WebDatasetVideos
from tests.data.clips import clip_bytes, frames_of_greys, numbers, turned, write_video_folder
from tests.data.tars import captioned, write_tar

NAMES = [f"clip-{i:02d}" for i in range(10)]


def clip(count=5, fps=None, resolution=16, crop="center"):
    return Clip(count, fps, resolution, crop)


def folder(root: Path, split="all", **options):
    return VideoFolderPairs(root, 16, split, **{"frames": 4, **options})


# ---- what is taken of a video ----


def test_a_clip_is_the_first_frames_as_uint8():
    video = clip().of_video(clip_bytes(), "a", "a")
    assert video.shape == (5, 16, 16, 3) and video.dtype == torch.uint8 and video.is_contiguous()
    assert numbers(video) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["mp4", "mov", "matroska", "webm", "avi"])
def test_half_the_rate_is_every_second_frame_in_any_container(kind):
    assert numbers(clip(6, fps=4).of_video(clip_bytes(kind=kind), "a", "a")) == [0, 2, 4, 6, 8, 10]


def test_every_frame_is_cut_as_an_image_of_it_is():
    wide = clip_bytes(size=(48, 16))
    with av.open(io.BytesIO(wide)) as container:
        stored = [frame.to_image() for frame in container.decode(video=0)]
    for crop in ("center", "random"):
        video = clip(3, crop=crop).of_video(wide, "a", "key")
        for frame, image in zip(video, stored, strict=False):
            assert torch.equal(frame.permute(2, 0, 1), cut_out(image, 16, crop, "key"))
    assert clip(3, resolution="16x24").of_video(wide, "a", "key").shape == (3, 16, 24, 3)


def test_a_video_of_a_phone_held_upright_is_shown_upright():
    plain, upright = (clip(2).of_video(file, "a", "a") for file in (clip_bytes(), turned(clip_bytes())))
    # What was its left half is darker, and at the top after a quarter turn clockwise.
    assert (plain[:, :, 0] < plain[:, :, -1] - 15).all() and (upright[:, 0] < upright[:, -1] - 15).all()


@pytest.mark.parametrize("rate", [8, 23.976, 24, 25, 29.97, 30, 60])
@pytest.mark.parametrize("fps", [1, 6, 8, 12, 24])
def test_frames_at_a_rate_come_when_their_turn_comes_each_once(rate, fps):
    shown = [(round(k / rate, 4), k) for k in range(200)]
    if fps > rate * 1.01:
        with pytest.raises(ValueError, match=f"no frame for every 1/{fps} s"):
            list(at_rate(shown, fps))
        return
    taken = list(at_rate(shown, fps))[:100]
    assert taken == sorted(set(taken)) and len(taken) == min(100, int((200 - 1) / rate * fps + 1.01))
    assert all(-0.002 < k / rate - turn / fps < 1.01 / rate for turn, k in enumerate(taken))


def test_frames_as_images_are_in_the_order_of_their_numbers():
    assert in_order(["f10.png", "f2.png", "f1.png", "e3.png"]) == ["e3.png", "f1.png", "f2.png", "f10.png"]


@pytest.mark.parametrize(
    ("make", "content", "flaw"),
    [
        (clip, b"", "it is empty"),
        (clip, b"no video at all", "Invalid data found when processing input"),
        (clip, clip_bytes()[:900], "Invalid data found|End of file"),
        (lambda: clip(13), clip_bytes(), "it has 12 frames, of data.frames=13"),
        (lambda: clip(7, fps=4), clip_bytes(), "it has 6 frames at data.fps=4, of data.frames=7"),
        (lambda: clip(5, fps=16), clip_bytes(), "it has no frame for every 1/16 s: data.fps takes its rate or less"),
    ],
)
def test_a_video_that_is_no_clip_is_named_with_its_flaw_in_one_line(make, content, flaw, tmp_path):
    (tmp_path / "a.mp4").write_bytes(content)
    for source in (content, tmp_path / "a.mp4"):
        with pytest.raises(BrokenImageError, match=rf"^tar: key \({flaw}.*\)$"):
            make().of_video(source, "tar: key", "key")


def test_a_sound_file_holds_no_video(tmp_path):
    file = tmp_path / "a.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(BrokenImageError, match="it holds no video"):
        clip().of_video(file, "a", "a")


def test_a_playlist_that_is_called_a_video_opens_no_other_file(tmp_path):
    (tmp_path / "other.mp4").write_bytes(clip_bytes())
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile 'other.mp4'\n")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(list(container.decode(video=0))) == 12  # as FFmpeg takes it
    with pytest.raises(BrokenImageError, match="Invalid argument"):
        clip().of_video(tmp_path / "a.mp4", "a", "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"count": 0}, "data.frames=0 must be at least 1"), ({"fps": 0.0}, "data.fps=0.0 must be above 0"),
     ({"crop": "left"}, "crop='left' is unknown")],
)  # fmt: skip
def test_a_clip_that_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        clip(**options)


def test_a_missing_package_is_named_in_one_line(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *rest, **options)

    write_video_folder(tmp_path, NAMES[:2])
    monkeypatch.setattr(builtins, "__import__", without)
    for make in (check_pyav, lambda: folder(tmp_path), lambda: WebDatasetVideos(str(tmp_path), 16, frames=4)):
        with pytest.raises(ValueError, match=r"^videos are decoded by PyAV: pip install 'slimstep\[video\]' \(.*\)$"):
            make()


# ---- folders ----


def test_a_folder_of_videos_has_captions_beside_them_or_in_metadata(tmp_path):
    write_video_folder(tmp_path, NAMES[:3])
    (tmp_path / "clip-02.txt").unlink()
    (tmp_path / "clip-00.jpg").write_bytes(b"a poster, of which nobody reads anything")
    (tmp_path / "metadata.csv").write_text("file_name,text\nclip-02.mp4,from the table\n")
    pairs = folder(tmp_path)
    assert [pairs.caption(i) for i in range(3)] == ["caption of clip-00", "caption of clip-01", "from the table"]
    item = pairs[2]
    assert item["caption"] == "from the table" and numbers(item["video"]) == [0, 1, 2, 3]


def write_frames(root: Path, name: str, count: int = 8) -> None:
    (root / name).mkdir(parents=True)
    for k, frame in enumerate(frames_of_greys(count)):
        Image.fromarray(frame).save(root / name / f"frame-{k}.png")
    (root / f"{name}.txt").write_text(f"caption of {name}")


def test_a_folder_of_frames_is_a_video_with_its_caption_beside_it(tmp_path):
    for name in ("a", "b.take.2", "deep/c"):
        write_frames(tmp_path, name, count=12)
    (tmp_path / "b.take.2.txt").unlink()
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b.take.2", "text": "from the table"}))
    pairs = folder(tmp_path, frames=11)
    assert [pairs[i]["caption"] for i in range(3)] == ["caption of a", "from the table", "caption of deep/c"]
    assert numbers(pairs[1]["video"]) == list(range(11))  # frame-2 before frame-10


def test_frames_as_images_say_no_rate_which_a_choice_of_fps_needs(tmp_path):
    write_frames(tmp_path, "a")
    with pytest.raises(ValueError, match=r"data.fps=4: .*: give data.frame_rate, or data.fps=null"):
        folder(tmp_path, fps=4.0)
    assert numbers(folder(tmp_path, fps=4.0, frame_rate=8.0)[0]["video"]) == [0, 2, 4, 6]


def test_a_folder_without_videos_says_what_it_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"video folder .* holds no videos \(\.mp4, .*, or folders of frames\)"):
        folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="video folder .* does not exist"):
        folder(tmp_path / "no")


def test_videos_without_captions_are_counted_and_named(tmp_path, caplog):
    write_video_folder(tmp_path, NAMES)
    (tmp_path / "clip-03.txt").unlink()
    with caplog.at_level(logging.WARNING, "slimstep"):
        assert len(folder(tmp_path)) == 9
    assert "1 of 10 videos and captions" in caplog.text and "clip-03.mp4 has no caption" in caplog.text
    with pytest.raises(ValueError, match="1 of 10 videos and captions in .* are no pair, and at most 0 may"):
        folder(tmp_path, max_broken=0)


def test_the_held_out_split_depends_on_names_alone(tmp_path):
    write_video_folder(tmp_path, NAMES, count=4)
    train, heldout = (folder(tmp_path, split, heldout_fraction=0.3) for split in ("train", "heldout"))
    held = {f"{name}.mp4" for name in NAMES if is_held_out(f"{name}.mp4", 0.3)}
    assert {name for name, _ in heldout.pairs} == held and len(train) + len(heldout) == 10
    assert set(heldout_prompts(heldout)) == {f"caption of {name.removesuffix('.mp4')}" for name in held}


def test_a_fingerprint_changes_with_what_is_taken_and_with_any_frame(tmp_path):
    write_video_folder(tmp_path / "files", NAMES[:2])
    write_frames(tmp_path / "images", "a")
    made = [folder(tmp_path / "files", **options).fingerprint
            for options in ({}, {"frames": 5}, {"fps": 4.0}, {"crop": "random"})]  # fmt: skip
    made += [folder(tmp_path / "images").fingerprint]
    write_frames(tmp_path / "images", "b")
    made += [folder(tmp_path / "images").fingerprint]
    Image.new("RGB", (24, 16)).save(tmp_path / "images/a/frame-2.png")
    made += [folder(tmp_path / "images").fingerprint]
    assert len(set(made)) == len(made) and folder(tmp_path / "files").fingerprint == made[0]


# ---- tars ----


def sound(keys):
    return {name: content for key in keys for name, content in
            ((f"{key}.mp4", clip_bytes()), (f"{key}.txt", f"caption of {key}".encode()))}  # fmt: skip


def tars(source, split="all", **options):
    return WebDatasetVideos(str(source), 16, split, **{"frames": 4, **options})


def test_tars_of_videos_are_streams_of_clips(tmp_path):
    broken = {"c.webm": b"broken", "c.jpg": b"a poster", "c.json": captioned("c")}
    write_tar(tmp_path / "a.tar", sound(["a", "b"]) | broken)
    pairs = tars(tmp_path, fps=4.0)
    entries = list(pairs.read(0, 0))
    assert [(entry.key, entry.caption, entry.flaw) for entry in entries] == [
        ("a", "caption of a", None), ("b", "caption of b", None), ("c", "c", None)
    ]  # fmt: skip
    item = pairs.sample(entries[1])
    assert item["caption"] == "caption of b" and numbers(item["video"]) == [0, 2, 4, 6]
    with pytest.raises(BrokenImageError, match=r"a.tar: c \(Invalid data found"):
        pairs.sample(entries[2])


def test_captions_are_read_off_a_tar_without_its_videos(tmp_path):
    write_tar(tmp_path / "a.tar", sound(["a", "b"]))
    entries = list(tars(tmp_path).scan(images=False))
    assert [(entry.image, entry.caption) for entry in entries] == [(None, "caption of a"), (None, "caption of b")]


def test_a_sample_without_one_video_is_flawed_and_a_column_chooses(tmp_path):
    files = {"a.jpg": b"", "a.txt": b"a", "b.mp4": b"1", "b.webm": b"2", "b.txt": b"b"}
    write_tar(tmp_path / "a.tar", files)
    flaws = [entry.flaw for entry in tars(tmp_path).read(0, 0)]
    assert flaws[0].startswith("no video among") and flaws[1].startswith("several videos among")
    assert [entry.image for entry in tars(tmp_path, video_column="WebM").read(0, 0)][1] == b"2"


def test_a_stream_changes_its_fingerprint_with_what_is_taken(tmp_path):
    write_tar(tmp_path / "a.tar", sound(["a"]))
    assert len({tars(tmp_path, **options).fingerprint for options in ({}, {"frames": 5}, {"fps": 4.0})}) == 3
