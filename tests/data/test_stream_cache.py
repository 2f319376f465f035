"""Streams in the cache: whatever interrupted it, however many made it, the same bits; what is broken is counted."""

import copy
import io
import json
import threading

import datasets
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from slimstep.data import cache as cache_module
from slimstep.data.cache import cache_pairs
from slimstep.data.images import ImageFolderPairs
from slimstep.data.rows import HubStream, ParquetPairs, hub_pairs
from slimstep.data.stream_cache import PartShards
from slimstep.data.streams import Stream
from slimstep.data.webdataset import WebDatasetPairs
from tests.data.tars import picture, sound, write_tar, write_tars

SHARDS = {"batch_size": 2, "shard_size": 4}


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if "lock" not in path.name}


@pytest.fixture
def tables(tmp_path):
    """Three parquet files of ten rows; a row's picture and caption are of its number."""
    for part in range(3):
        rows = [
            {"image": {"bytes": picture(f"{part}-{i}"), "path": None}, "text": f"row {part}-{i}"} for i in range(10)
        ]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"train-{part}.parquet", batch_size=4)
    return tmp_path


@pytest.fixture(params=["webdataset", "parquet", "hub"])
def stream(request, tmp_path):
    """A maker of equal streams of 30 samples in 3 parts, a share of them held out."""
    (tmp_path / "source").mkdir()
    if request.param == "webdataset":
        write_tars(tmp_path / "source")
        return lambda: WebDatasetPairs(str(tmp_path / "source"), 16, heldout_fraction=0.2)
    for part in range(3):
        rows = [{"image": {"bytes": picture(f"{part}{i}"), "path": None}, "text": f"{part}{i}"} for i in range(10)]
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(tmp_path / f"source/train-{part}.parquet", batch_size=4)
    kind = {"parquet": ParquetPairs, "hub": HubStream}[request.param]
    return lambda: kind(str(tmp_path / "source"), 16, heldout_fraction=0.2)


def test_the_cache_holds_the_training_split_part_by_part_as_at_random_access(pipeline, stream, tmp_path):
    pairs = stream()
    cached = cache_pairs(pairs, pipeline, tmp_path, **SHARDS)
    entries = [entry for part in range(3) for entry in pairs.read(part, 0) if pairs.wants(entry)]
    captions = [cached.caption(i) for i in range(len(cached))]
    assert captions == [entry.caption for entry in entries] and 15 < len(cached) < 30
    images = torch.stack([pairs.sample(entry)["image"] for entry in entries[:2]])  # as batched when it was encoded
    with torch.no_grad():
        mean = pipeline.vae.encode(images / 127.5 - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert torch.equal(torch.stack([cached[i]["latents"] for i in range(2)]), mean)
    assert len({cached[i]["index"] for i in range(len(cached))}) == len(cached)


@pytest.mark.parametrize("at", [0, 1, 7, 12, 19])
def test_a_killed_caching_goes_on_at_its_part_and_position_and_ends_the_same(
    pipeline, stream, tmp_path, at, monkeypatch
):
    pairs, seen, read = stream(), [], []

    def killed(entry):
        seen.append(entry)
        if len(seen) > at:
            raise KeyboardInterrupt
        return type(pairs).sample(pairs, entry)

    pairs.sample = killed
    with pytest.raises(KeyboardInterrupt):
        cache_pairs(pairs, pipeline, tmp_path / "killed", **SHARDS)
    pairs = stream()
    pairs.read = lambda part, start: read.append((part, start)) or type(pairs).read(pairs, part, start)
    resumed = cache_pairs(pairs, pipeline, tmp_path / "killed", **SHARDS)
    whole = cache_pairs(stream(), pipeline, tmp_path / "whole", **SHARDS)
    assert shard_bytes(resumed.folder) == shard_bytes(whole.folder)
    records = [json.loads(p.read_text()) for p in sorted(whole.folder.glob("part-*.json"))]
    counts = [record["samples"] for record in records]
    done = next(k for k in range(len(counts)) if sum(counts[: k + 1]) > at)  # shards that were whole
    part = int(records[done]["file"].split("-")[1])
    before = records[done - 1]["end"] if done else None
    assert read[0] == (part, before or 0) and [p for p, _ in read] == list(range(part, 3))


def test_two_processes_make_the_same_files_as_one(pipeline, stream, tmp_path, monkeypatch):
    barrier, requested = threading.Barrier(2), {0: [], 1: []}
    monkeypatch.setattr(cache_module, "agree", lambda folder, world: None)

    class Rank:
        num_processes, device = 2, torch.device("cpu")

        def __init__(self, process_index):
            self.process_index = process_index

        def wait_for_everyone(self):
            barrier.wait(timeout=60)

    def work(rank, pipeline):
        pairs = stream()
        pairs.read = lambda part, start: requested[rank].append(part) or type(pairs).read(pairs, part, start)
        cache_pairs(pairs, pipeline, tmp_path / "two", accelerator=Rank(rank), **SHARDS)

    threads = [threading.Thread(target=work, args=(rank, copy.deepcopy(pipeline))) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert requested == {0: [0, 2], 1: [1]}
    one = cache_pairs(stream(), pipeline, tmp_path / "one", **SHARDS)
    assert shard_bytes(tmp_path / "two" / one.folder.name) == shard_bytes(one.folder)


def test_threads_that_decode_change_nothing(pipeline, stream, tmp_path):
    alone = cache_pairs(stream(), pipeline, tmp_path / "alone", **SHARDS)
    helped = cache_pairs(stream(), pipeline, tmp_path / "helped", workers=3, **SHARDS)
    assert shard_bytes(alone.folder) == shard_bytes(helped.folder)


def test_a_finished_cache_is_not_made_again_and_nothing_is_read(pipeline, stream, tmp_path):
    first = cache_pairs(stream(), pipeline, tmp_path, **SHARDS)
    pairs = stream()
    pairs.read = None
    assert cache_pairs(pairs, pipeline, tmp_path, **SHARDS).fingerprint == first.fingerprint


@pytest.mark.parametrize("damage", ["one bit", "gone"])
def test_a_damaged_shard_is_made_again_and_only_it(pipeline, stream, tmp_path, damage):
    cached = cache_pairs(stream(), pipeline, tmp_path, **SHARDS)
    before = shard_bytes(cached.folder)
    shard = cached.folder / "part-00001-00001.safetensors"
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(before[shard.name][:-1] + bytes([before[shard.name][-1] ^ 1]))
    times = {path: path.stat().st_mtime_ns for path in cached.folder.glob("part-*")}
    cache_pairs(stream(), pipeline, tmp_path, **SHARDS)
    assert shard_bytes(cached.folder) == before
    assert {path.stem for path in times if path.stat().st_mtime_ns != times[path]} == {shard.stem}


def test_a_shard_that_is_lost_while_others_are_made_is_no_part_of_an_index(pipeline, stream, tmp_path):
    cached = cache_pairs(stream(), pipeline, tmp_path, **SHARDS)
    shards = PartShards(stream(), cached.folder, SHARDS["shard_size"])
    lost = shards.paths()[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost.name} was made, and is gone or damaged"):
        shards.paths()


def test_two_jobs_over_one_cache_make_it_once(pipeline, stream, tmp_path):
    requested = []

    def work(pipeline):
        pairs = stream()
        pairs.read = lambda part, start: requested.append(part) or type(pairs).read(pairs, part, start)
        cache_pairs(pairs, pipeline, tmp_path / "one", **SHARDS)

    threads = [threading.Thread(target=work, args=(copy.deepcopy(pipeline),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert requested == [0, 1, 2]


def test_broken_samples_are_skipped_counted_and_named_by_tar_and_key(pipeline, tmp_path, caplog):
    (tmp_path / "source").mkdir()
    good = sound([f"{i:02d}" for i in range(10)])
    files = {"x.png": picture("x"), **good, "y.png": picture("y")[:50], "y.txt": b"torn", "z.txt": b"alone"}
    write_tar(tmp_path / "source/a.tar", files)
    torn = write_tar(tmp_path / "source/b.tar", sound([f"{i:02d}" for i in range(10)]))
    torn.write_bytes(torn.read_bytes()[:4000])
    pairs = WebDatasetPairs(str(tmp_path / "source"), 16, "all", max_broken=4)
    cached = cache_pairs(pairs, pipeline, tmp_path, batch_size=4, shard_size=5)
    assert [name.split(" (")[0] for name in cached.broken] == ["a.tar: x", "a.tar: y", "a.tar: z", "b.tar"]
    assert len(cached) == 11 and "4 broken images are skipped: a.tar: x" in caplog.text
    assert "1 of them are torn tars" in caplog.text
    pairs.max_broken = 3
    with pytest.raises(ValueError, match=r"4 of 15 samples cannot .*=3 skips 3: a.tar: x \(no "):
        cache_pairs(pairs, pipeline, tmp_path, batch_size=4, shard_size=5)
    with pytest.raises(ValueError, match=r"4 of \d+ samples so far cannot .*=3 skips 3"):
        cache_pairs(pairs, pipeline, tmp_path / "new", batch_size=4, shard_size=5)


def test_large_images_are_held_few_at_a_time(pipeline, tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", sound([f"{i:02d}" for i in range(10)]))
    pairs = WebDatasetPairs(str(tar), 16, "all")
    whole = cache_pairs(pairs, pipeline, tmp_path / "whole")
    monkeypatch.setattr("slimstep.data.stream_cache.TAKEN_BYTES", 3 * len(picture("00")))
    few = cache_pairs(pairs, pipeline, tmp_path / "few")
    assert len(list(few.folder.glob("part-*.safetensors"))) == 4
    assert [few[i]["index"] for i in range(10)] == [whole[i]["index"] for i in range(10)]


def test_a_share_of_broken_samples_is_checked_at_the_end_or_far_above_it(pipeline, tmp_path):
    good = sound([f"{i:04d}" for i in range(300)])
    bad = {f"bad{i:02d}.txt": b"alone" for i in range(60)}
    tar = write_tar(tmp_path / "a.tar", {**{f"bad{i:02d}.txt": b"alone" for i in range(12)}, **good})
    pairs = WebDatasetPairs(str(tar), 16, "all", max_broken=0.05)
    assert len(cache_pairs(pairs, pipeline, tmp_path, shard_size=64)) == 300
    pairs.max_broken = 0.01
    with pytest.raises(ValueError, match=r"12 of 312 samples cannot .*=0.01 skips 10: "):
        cache_pairs(pairs, pipeline, tmp_path, shard_size=64)
    write_tar(tar, {**bad, **good})
    pairs = WebDatasetPairs(str(tar), 16, "all", max_broken=0.01)
    with pytest.raises(ValueError, match=r"60 of 60 samples so far cannot .*=0.01 skips 50: "):
        cache_pairs(pairs, pipeline, tmp_path, shard_size=64)


def test_a_stream_without_samples_is_reported(pipeline, tmp_path):
    write_tar(tmp_path / "a.tar", {"readme": b"nothing"})
    with pytest.raises(
        ValueError, match="train split of 1 parts from .*a.tar on holds no samples; look at data"
    ):
        cache_pairs(WebDatasetPairs(str(tmp_path / "a.tar"), 16, max_broken=5), pipeline, tmp_path)


def test_photographs_give_the_same_latents_from_a_tar_as_from_their_folder(photo_folder, pipeline, tmp_path):
    folder = ImageFolderPairs(photo_folder, 64, split="all")
    files = {}
    for i, (name, caption) in enumerate(folder.pairs[:50]):
        files |= {f"{i:03d}.jpg": (photo_folder / name).read_bytes(), f"{i:03d}.txt": caption.encode()}
    tar = write_tar(tmp_path / "photos.tar", files)
    some = Subset(folder, range(50))
    some.fingerprint = "the first fifty"
    here = cache_pairs(some, pipeline, tmp_path)
    there = cache_pairs(WebDatasetPairs(str(tar), 64, "all"), pipeline, tmp_path, workers=2)
    assert [here.caption(i) for i in range(len(here))] == [there.caption(i) for i in range(len(there))]
    for i in range(50):
        assert torch.equal(here[i]["latents"], there[i]["latents"]) and torch.equal(here[i]["text"], there[i]["text"])


# Tables.


def test_reading_a_table_goes_on_at_any_row(tables):
    for pairs in (ParquetPairs(str(tables), 16, "all"), HubStream(str(tables), 16, "all")):
        whole = list(pairs.read(1, 0))
        assert [entry.caption for entry in whole] == [f"row 1-{i}" for i in range(10)]
        assert all(list(pairs.read(1, k)) == whole[k:] for k in range(11))
        assert [entry.caption for entry in pairs.read(1, 7, images=False)] == ["row 1-7", "row 1-8", "row 1-9"]


def test_rows_without_an_image_or_a_caption_are_broken_samples(tmp_path):
    rows = [{"image": {"bytes": b"x", "path": None}, "words": ["a", "b"]}, {"image": None, "words": ["c"]},
            {"image": {"bytes": b"x", "path": None}, "words": []}]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    for kind in (ParquetPairs, HubStream):
        first, *broken = kind(str(tmp_path), 16, "all", caption_column="words").read(0, 0)
        assert first.caption == "a" and first.image == b"x"
        assert [entry.flaw[:22] for entry in broken] == ["no image", "column words is empty "]


def test_bare_bytes_are_images_too(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 7, np.uint8)).save(file, "png")
    datasets.Dataset.from_list([{"jpg": file.getvalue(), "prompt": "x"}]).to_parquet(tmp_path / "a.parquet")
    pairs = ParquetPairs(str(tmp_path / "a.parquet"), 16, "all", image_column="jpg")
    assert pairs.sample(next(pairs.read(0, 0)))["image"].unique().tolist() == [7]


@pytest.mark.parametrize("kind", [ParquetPairs, HubStream])
def test_mistakes_about_a_table_are_one_line(tables, kind):
    with pytest.raises(ValueError, match="has no column 'picture'; its columns are image, text"):
        kind(str(tables), 16, image_column="picture")
    with pytest.raises(ValueError, match="has no column 'words'; its columns are image, text"):
        kind(str(tables), 16, caption_column="words")
    with pytest.raises(ValueError, match=r"nowhere.*(names no file|cannot be loaded)"):
        kind(f"{tables}/nowhere", 16)
    (tables / "train-0.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"train-0.parquet cannot be read as a parquet file|cannot be loaded"):
        kind(str(tables), 16)


def test_files_of_other_columns_are_reported_by_name(tables):
    datasets.Dataset.from_list([{"picture": b"x", "text": "y"}]).to_parquet(tables / "train-2.parquet")
    pairs = ParquetPairs(str(tables), 16, "all")
    with pytest.raises(ValueError, match=r"train-2.parquet has no column 'image'; its columns are picture, text"):
        list(pairs.read(2, 0))


def test_what_is_held_out_of_a_table_stays_so_when_files_are_added(tables):
    def held_out():
        pairs = ParquetPairs(str(tables), 16, "heldout", heldout_fraction=0.4)
        return {entry.caption for entry in pairs.scan(images=False)}

    before = held_out()
    datasets.Dataset.from_list([{"image": b"x", "text": "new"}]).to_parquet(tables / "a-first-one.parquet")
    assert before and held_out() - {"new"} == before


def test_images_of_a_table_may_lie_behind_urls(tmp_path):
    store = fsspec.filesystem("memory")
    store.pipe_file("/pictures/a.png", picture("a"))
    paths = ["memory://pictures/a.png", "memory://pictures/gone.png"]
    rows = [{"image": {"bytes": None, "path": path}, "text": "x"} for path in paths]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    there, gone = ParquetPairs(str(tmp_path), 16, "all").read(0, 0)
    assert there.image == picture("a") and "gone.png cannot be opened" in gone.flaw


def test_a_folder_of_pictures_streams_as_the_hub_gives_it(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(picture(name))
    lines = [json.dumps({"file_name": f"{name}.png", "text": f"a picture of {name}"}) for name in "abc"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    pairs = HubStream(str(tmp_path), 16, "all")
    entries = [entry for part in range(len(pairs.parts)) for entry in pairs.read(part, 0)]
    assert [entry.caption for entry in entries] == [f"a picture of {name}" for name in "abc"]
    assert all(pairs.sample(entry)["image"].shape == (3, 16, 16) for entry in entries)


def test_streaming_is_a_switch_of_the_hub(tables):
    pairs = hub_pairs(str(tables), 16, streaming=True, split="all")
    assert isinstance(pairs, Stream) and len(pairs.parts) == 3
    with pytest.raises(ValueError, match="data.skip_empty=true: a stream"):
        hub_pairs(str(tables), 16, streaming=True, skip_empty=True)
    datasets.load_dataset(str(tables), split="train", cache_dir=tables / "hf").save_to_disk(tables / "saved")
    with pytest.raises(ValueError, match="was saved whole and is read at random access: data.streaming=false"):
        hub_pairs(str(tables / "saved"), 16, streaming=True)
