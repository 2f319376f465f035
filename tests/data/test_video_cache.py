"""The cache of videos: their latents are those of the pipeline, and of a stream no more is held than is worked on."""

import weakref

import pytest
import torch

from scripts.random_transformers import small_cogvideox_pipeline
from slimstep.data.cache import cache_pairs
from slimstep.data.encoding import encode_images
from slimstep.data.frames import Clip
from slimstep.data.videos import VideoFolderPairs, WebDatasetVideos
from tests.data.clips import clip_bytes, write_video_folder
from tests.data.tars import write_tar

NAMES = [f"clip-{i:02d}" for i in range(8)]


@pytest.fixture(scope="module")
def pipeline():
    """Latents [4, 3, 4, 4] of 9 frames of 16×16."""
    return small_cogvideox_pipeline()


def write_tars(folder, names=NAMES, per_tar=4):
    for first in range(0, len(names), per_tar):
        files = {}
        for name in names[first : first + per_tar]:
            files |= {f"{name}.mp4": clip_bytes(), f"{name}.txt": f"caption of {name}".encode()}
        write_tar(folder / f"part-{first:03d}.tar", files)
    return str(folder)


def test_cached_latents_are_those_of_the_videos_and_captions_stay_beside_theirs(pipeline, tmp_path):
    pairs = VideoFolderPairs(write_video_folder(tmp_path / "videos", NAMES[:3]), 16, "all", frames=9)
    cached = cache_pairs(pairs, pipeline, tmp_path / "cache", batch_size=2, shard_size=2)
    with torch.no_grad():
        expected = encode_images(pipeline, torch.stack([pairs[i]["video"] for i in range(3)]), torch.device("cpu"))
    assert len(cached) == 3 and cached[0]["latents"].shape == (4, 3, 4, 4)
    for i in range(3):
        torch.testing.assert_close(cached[i]["latents"], expected["latents"][i], rtol=1e-4, atol=1e-5)
        assert cached.caption(i) == f"caption of {NAMES[i]}"


def test_tars_of_videos_have_the_latents_of_the_folder_and_broken_ones_are_left_out(pipeline, tmp_path):
    folder = write_video_folder(tmp_path / "videos", NAMES[:3])
    (folder / "clip-01.mp4").write_bytes(clip_bytes(count=8))
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    write_tar(tmp_path / "a.tar", files)
    of_folder = VideoFolderPairs(folder, 16, "all", frames=9)
    of_tar = WebDatasetVideos(str(tmp_path / "a.tar"), 16, "all", frames=9)
    caches = [cache_pairs(pairs, pipeline, tmp_path / "cache", batch_size=1) for pairs in (of_folder, of_tar)]
    for cached, name in zip(caches, ("clip-01.mp4", "a.tar: clip-01"), strict=True):
        assert len(cached) == 2 and cached.broken == [f"{name} (it has 8 frames, of data.frames=9)"]
    for i in range(2):
        assert torch.equal(caches[0][i]["latents"], caches[1][i]["latents"])


def test_a_number_of_frames_that_the_autoencoder_cannot_take_is_one_line(pipeline, tmp_path):
    pairs = VideoFolderPairs(write_video_folder(tmp_path / "videos", NAMES[:2]), 16, "all", frames=8)
    with pytest.raises(ValueError, match=r"^videos of 8 frames do not fit this pipeline: .*; nearest: 1, 9$"):
        cache_pairs(pairs, pipeline, tmp_path / "cache")


class Alive:
    """How many of the tensors that it was shown are still somewhere, at most."""

    def __init__(self):
        self.now = self.most = 0

    def watch(self, tensor):
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._gone)
        return tensor

    def _gone(self):
        self.now -= 1


@pytest.mark.parametrize("source", ["folder", "tars"])
def test_as_many_videos_are_held_as_make_two_batches_however_many_there_are(source, pipeline, tmp_path, monkeypatch):
    alive, decode = Alive(), Clip.of_video
    monkeypatch.setattr(Clip, "of_video", lambda *arguments: alive.watch(decode(*arguments)))
    if source == "folder":
        pairs = VideoFolderPairs(write_video_folder(tmp_path / "videos", NAMES), 16, "all", frames=9)
    else:
        (tmp_path / "tars").mkdir()
        pairs = WebDatasetVideos(write_tars(tmp_path / "tars"), 16, "all", frames=9)
    cached = cache_pairs(pairs, pipeline, tmp_path / "cache", batch_size=2, shard_size=4)
    assert len(cached) == 8 and 2 <= alive.most <= 4
