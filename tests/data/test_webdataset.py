"""Tars as streams: what is read, where reading goes on, and what becomes of broken members."""

import hashlib
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from slimstep.data import sources
from slimstep.data.cache import cache_pairs
from slimstep.data.images import image_cell, is_held_out
from slimstep.data.prompts import heldout_prompts
from slimstep.data.sources import unbrace
from slimstep.data.streams import FirstSamples
from slimstep.data.webdataset import WebDatasetPairs
from tests.data.tars import captioned, picture, sound, write_tar, write_tars


def read(source, part=0, start=0, **options):
    return list(WebDatasetPairs(str(source), 16, "all", **options).read(part, start))


def captions(entries):
    return {entry.key: entry.caption for entry in entries if not entry.flaw}


def flaws(entries):
    return {entry.key: entry.flaw for entry in entries if entry.flaw}


# What is read.


def test_samples_come_in_the_tars_order_with_their_captions(tmp_path):
    pairs = WebDatasetPairs(write_tars(tmp_path), 16, "all")
    entries = [entry for part in range(3) for entry in pairs.read(part, 0)]
    assert [entry.caption for entry in entries] == [f"caption of {t}-{i:03d}" for t in range(3) for i in range(10)]
    assert entries[3].image == picture("0-003") and pairs.sample(entries[3])["image"].shape == (3, 16, 16)


@pytest.mark.parametrize("kind", ["png", "jpg", "jpeg", "webp", "JPG"])
def test_any_suffix_of_an_image_is_one(tmp_path, kind):
    image = picture("a", {"jpg": "jpeg"}.get(kind.lower(), kind.lower()))
    write_tar(tmp_path / "a.tar", {f"a.{kind}": image, "a.txt": b"a", "a.cls": b"1", "a.seg.png": b"mask"})
    assert [entry.image for entry in read(tmp_path / "a.tar")] == [image]


def test_captions_are_a_txt_a_key_of_the_json_or_what_is_named(tmp_path):
    files = {"a.png": b"", "a.json": captioned("one"), "b.png": b"", "b.txt": b"two\n", "b.json": captioned("no")}
    tar = write_tar(tmp_path / "a.tar", files | {"c.png": b"", "c.json": captioned("c"), "c.blip": b"three"})
    assert captions(read(tar)) == {"a": "one", "b": "two", "c": "c"}
    assert captions(read(tar, caption_column="blip")) == {"a": "blip one", "b": "blip no", "c": "three"}
    assert captions(read(tar, caption_column="TXT", image_column="PNG")) == {"b": "two"}


def test_folders_hidden_files_and_dots_in_folders_make_no_samples(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"x.y/._1.png": b"", "x.y/1.png": b"", ".DS_Store": b"", "x.y/1.txt": b"one"})
    assert captions(read(tar)) == {"x.y/1": "one"}


def test_sources_are_files_folders_globs_lists_and_braces(tmp_path):
    paths = write_tars(tmp_path)
    for source in (str(tmp_path), f"{tmp_path}/*.tar", f"{tmp_path}/part-{{000..002}}.tar", paths):
        assert WebDatasetPairs(source, 16).parts == paths
    assert unbrace("{a,b}-{9..10}") == ["a-9", "a-10", "b-9", "b-10"] and unbrace("{08..10}") == ["08", "09", "10"]
    (tmp_path / "._part-000.tar").write_bytes(b"what a Mac leaves beside a file")
    assert WebDatasetPairs([str(tmp_path), f"{tmp_path}/*0.tar"], 16).parts == paths
    with pytest.raises(ValueError, match=r"data.source: \{3..1\} counts to nothing"):
        WebDatasetPairs("part-{3..1}.tar", 16)
    for source in (f"{tmp_path}/none-*.tar", f"{tmp_path}/part-{{002..003}}.tar", []):
        with pytest.raises(ValueError, match=r"data.source.* names no file"):
            WebDatasetPairs(source, 16)


def test_the_held_out_split_depends_on_keys_alone(tmp_path):
    write_tars(tmp_path)
    train, heldout = (WebDatasetPairs(str(tmp_path), 16, split, 0.3) for split in ("train", "heldout"))
    kept = {entry.key for entry in heldout.scan(images=False)}
    assert 0 < len(kept) < 30 and kept.isdisjoint(entry.key for entry in train.scan(images=False))
    (tmp_path / "part-001.tar").unlink()
    left = {entry.key for entry in WebDatasetPairs(str(tmp_path), 16, "heldout", 0.3).scan(images=False)}
    assert left == {key for key in kept if not key.startswith("1-")}


def test_prompts_are_held_out_captions_and_reading_stops_when_there_are_enough(tmp_path, monkeypatch):
    write_tars(tmp_path, tars=20)
    pairs, opened = WebDatasetPairs(str(tmp_path), 16, "heldout", 0.3), []
    recording = lambda name, at: opened.append(name) or sources.open_at(name, at)  # noqa: E731
    monkeypatch.setattr("slimstep.data.webdataset.open_at", recording)
    prompts = heldout_prompts(pairs, enough=[4, 5])
    assert len(prompts) == 9 and prompts.prompts == heldout_prompts(pairs, enough=[9]).prompts
    assert len(opened) < 20
    everything = {entry.caption for entry in pairs.scan(images=False)}
    assert set(prompts) < everything and set(heldout_prompts(pairs, enough=[1000])) == everything
    with pytest.raises(ValueError, match=f"1000 prompts were asked for, the stream has {len(everything)} distinct"):
        heldout_prompts(pairs, 1000)


def test_images_for_judging_are_the_first_of_a_scan(tmp_path):
    pairs = WebDatasetPairs(write_tars(tmp_path), 16, "heldout", 0.5)
    first = FirstSamples(pairs, 5)
    assert len(first) == 5 and first[2]["caption"] == list(pairs.scan(images=True))[2].caption


@pytest.mark.parametrize("change", ["touched", "another tar", "caption_column", "split", "resolution"])
def test_the_fingerprint_changes_with_what_is_taken_from_what(tmp_path, change):
    paths = write_tars(tmp_path)
    before, options = WebDatasetPairs(str(tmp_path), 16).fingerprint, {"resolution": 16}
    if change == "touched":
        write_tar(tmp_path / "part-000.tar", sound(["other"]))
    elif change == "another tar":
        write_tar(tmp_path / "part-003.tar", sound(["other"]))
    else:
        options[change] = {"caption_column": "blip", "split": "heldout", "resolution": 8}[change]
    assert WebDatasetPairs(str(tmp_path), **options).fingerprint != before
    assert WebDatasetPairs(paths[:2], 16).fingerprint == WebDatasetPairs(paths[:2], 16).fingerprint


# Where reading goes on.


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_reading_goes_on_at_the_end_of_any_entry(tmp_path, suffix):
    tar = write_tar(tmp_path / f"a{suffix}", sound([f"{i:02d}" for i in range(6)]))
    whole = read(tar)
    assert all(read(tar, start=whole[k].end) == whole[k + 1 :] for k in range(6))


def test_long_names_do_not_break_the_positions(tmp_path):
    tar = write_tar(tmp_path / "a.tar", sound([f"{'deep/' * 60}{i}" for i in range(3)]))
    whole = read(tar)
    assert len(whole) == 3 and read(tar, start=whole[0].end) == whole[1:]


def test_no_held_out_caption_is_reported_with_the_way_out(tmp_path):
    pairs = WebDatasetPairs(write_tars(tmp_path), 16, "heldout", heldout_fraction=0)
    with pytest.raises(ValueError, match=r"none is held out of these data: .*heldout_fraction, or data.prompt_file"):
        heldout_prompts(pairs, enough=[4])


def test_where_no_held_out_sample_can_be_used_the_reason_is_reported(tmp_path):
    files = {f"{i:03d}.{kind}": b"" for i in range(60) for kind in ("jpg", "caption")}
    pairs = WebDatasetPairs(str(write_tar(tmp_path / "a.tar", files)), 16, "heldout", heldout_fraction=0.5)
    with pytest.raises(ValueError, match=r"samples cannot be used.*no caption .txt or .json among jpg; caption"):
        heldout_prompts(pairs, enough=[4])


def test_a_sample_of_very_many_files_is_one(tmp_path):
    frames = {f"clip.frame{k:03d}.png": b"" for k in range(150)}
    tar = write_tar(tmp_path / "a.tar", frames | {"clip.jpg": b"image", "clip.txt": b"many"})
    assert [(entry.image, entry.caption) for entry in read(tar)] == [(b"image", "many")]


# Names that come twice.


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("times", [2, 50, 700])
def test_samples_of_one_name_are_as_many_flaws_and_their_neighbours_are_read(tmp_path, suffix, times):
    many = [("b.png", b"image"), ("b.txt", b"caption")] * times
    tar = write_tar(tmp_path / f"a{suffix}", [*sound(["a"]).items(), *many, *sound(["c"]).items()])
    entries = read(tar)
    assert captions(entries) == {"a": "caption of a", "c": "caption of c"} and len(entries) == 2 + min(times, 512)
    assert f"png {times} times and txt {times} times under this one name" in entries[1].complaint
    for k in (0, 1, 2, len(entries) - 2):  # reading goes on within them
        assert read(tar, start=entries[k].end) == entries[k + 1 :]


@pytest.mark.parametrize("names", ["b.png b.txt b.txt", "b.PNG b.png b.txt", "b.png b.txt b.png"])
def test_an_image_never_meets_a_caption_of_another_sample(tmp_path, names):
    tar = write_tar(tmp_path / "a.tar", [*sound(["a"]).items(), *((name, b"x") for name in names.split())])
    entries = read(tar)
    assert captions(entries) == {"a": "caption of a"} and "2 times under this one name" in entries[1].flaw


def test_a_tar_of_one_name_is_refused_with_its_count(tmp_path, pipeline):
    tar = write_tar(tmp_path / "a.tar", [("x.png", picture("x")), ("x.txt", b"x")] * 50)
    with pytest.raises(ValueError, match=r"50 of 50 samples cannot be used.*a.tar: x \(png 50 times and txt 50 times"):
        cache_pairs(WebDatasetPairs(str(tar), 16, "all"), pipeline, tmp_path)


def test_files_without_a_suffix_belong_to_no_sample(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("README", b""), ("a.png", b""), ("LICENSE", b""), ("a.txt", b"one")])
    assert captions(read(tar)) == {"a": "one"} and len(read(tar)) == 1


def one_key_in_every_tar(folder, names=None, samples=("0000",)):
    names = names or [f"part-{k:03d}" for k in range(20)]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        files = {f"{key}.png": picture(key) for key in samples} | {f"{k}.txt": f"{name} {k}".encode() for k in samples}
        write_tar(folder / f"{name}.tar", dict(sorted(files.items())))
    return str(folder / "**/*.tar")


@pytest.mark.parametrize("names", [None, [f"{k}/data" for k in "abcdefghijklmnopqrst"]])
def test_keys_that_every_tar_has_are_held_out_by_the_tars_names_too(tmp_path, caplog, names):
    caplog.set_level("INFO")
    source = one_key_in_every_tar(tmp_path, names)
    train, heldout = (WebDatasetPairs(source, 16, split, 0.3) for split in ("train", "heldout"))
    kept, other = ({entry.caption for entry in pairs.scan(images=False)} for pairs in (heldout, train))
    assert kept and other and not kept & other and len(kept | other) == 20
    assert len(heldout_prompts(heldout, enough=[100])) == len(kept)
    assert "begin with the same key, 0000: tars' names count" in caplog.text
    for tar in Path(tmp_path).rglob("*[12].tar"):  # a sample's place does not depend on the other tars
        tar.unlink()
    left = {entry.caption for entry in WebDatasetPairs(source, 16, "heldout", 0.3).scan(images=False)}
    assert left == {caption for caption in kept if caption.split()[0][-1] not in "12"}


def test_keys_that_differ_are_split_and_cached_as_ever(tmp_path):
    pairs = WebDatasetPairs(write_tars(tmp_path), 16, "heldout", 0.3)
    assert [entry.key for entry in pairs.scan(images=False)] == [
        f"{t}-{i:03d}" for t in dict.fromkeys(int(e.key[0]) for e in pairs.scan(images=False)) for i in range(10)
        if is_held_out(f"{t}-{i:03d}", 0.3)
    ]  # fmt: skip
    taken = ["heldout", 0.3, None, None, 16, "center"]
    hashed = hashlib.sha256(json.dumps([sources.marks(pairs.parts), taken]).encode()).hexdigest()
    assert pairs.fingerprint == f"webdataset-1/{hashed[:16]}"


def test_the_same_images_with_other_captions_stay_in_one_split(tmp_path):
    """Tars of one name and the same keys in two folders, as two languages of one data set have them."""
    source = one_key_in_every_tar(tmp_path, ["de/0", "de/1", "en/0", "en/1"], samples=[f"{k:03d}" for k in range(9)])
    heldout = [entry.caption for entry in WebDatasetPairs(source, 16, "heldout", 0.4).scan(images=False)]
    german, english = ({c[3:] for c in heldout if c.startswith(language)} for language in ("de", "en"))
    assert german == english and 0 < len(german) < 18


# Broken members.


def test_every_broken_sample_is_named_with_its_reason_and_the_others_are_read(tmp_path):
    files = sound(["a"]) | {
        "no-caption.png": picture("x"), "no-image.txt": b"text", "empty.png": b"", "empty.txt": b" \n",
        "no-key.png": b"", "no-key.json": b'{"size": 3}', "torn.png": b"", "torn.json": b'{"text": "x',
        "list.png": b"", "list.json": b"[1]", "latin.png": b"", "latin.txt": "é".encode("latin-1"),
        "two.png": b"", "two.jpg": b"", "two.txt": b"x",
    } | sound(["z"])  # fmt: skip
    entries = read(write_tar(tmp_path / "a.tar", files))
    assert captions(entries) == {"a": "caption of a", "z": "caption of z"}
    expected = {
        "no-caption": "no caption .txt or .json among png", "no-image": "no image among txt",
        "empty": ".txt is empty", "no-key": "none of the caption columns", "torn": "Unterminated string",
        "list": ".json is no object", "latin": "can't decode", "two": "several images among png; jpg; txt",
    }  # fmt: skip
    flaws_found = flaws(entries)
    assert flaws_found.keys() == expected.keys()
    assert all(reason in flaws_found[key] for key, reason in expected.items()), flaws_found
    assert entries[1].complaint == "a.tar: no-caption (no caption .txt or .json among png)"


def test_names_that_are_no_utf8_are_names(tmp_path):
    files = {"caf\udce9.png": picture("a"), "caf\udce9.txt": b"a", "\udce9.png": b"", "\udce9.txt": b"b"}
    tar = write_tar(tmp_path / "a.tar", files)
    parts = [WebDatasetPairs(str(tar), 16, split, 0.5) for split in ("train", "heldout")]
    assert sorted(entry.key for part in parts for entry in part.scan(True)) == ["caf\udce9", "\udce9"]
    pairs = WebDatasetPairs(str(tar), 16, "all", crop="random")
    sound_one, empty = pairs.read(0, 0)
    assert pairs.sample(sound_one)["caption"] == "a"
    with pytest.raises(ValueError, match="it is empty"):
        pairs.sample(empty)


def test_many_files_of_one_key_are_one_flaw_in_few_words(tmp_path):
    tar = write_tar(tmp_path / "a.tar", sound([f"laion.{i:04d}" for i in range(200)]) | sound(["z"]))
    flawed, whole = read(tar)
    assert flawed.flaw == "no image among 0000.png; 0000.txt; 0001.png; … (a key ends at its first dot)"
    assert whole.key == "z"


@pytest.mark.parametrize(("content", "message"), [(b"", "it is empty"), (b"text", "known kind")])
def test_what_is_no_image_is_reported_in_the_same_words_every_time(tmp_path, content, message):
    pairs = WebDatasetPairs(str(write_tar(tmp_path / "a.tar", {"a.png": content, "a.txt": b"x"})), 16, "all")
    complaints = []
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as error:
            pairs.sample(next(pairs.read(0, 0)))
        complaints.append(str(error.value))
    assert complaints[0] == complaints[1] and "0x" not in complaints[0]


def test_a_torn_image_is_reported_when_it_is_decoded(tmp_path):
    pairs = WebDatasetPairs(str(write_tar(tmp_path / "a.tar", {"a.png": picture("a")[:60], "a.txt": b"x"})), 16, "all")
    (entry,) = pairs.read(0, 0)
    with pytest.raises(ValueError, match="a.tar: a "):
        pairs.sample(entry)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.66, 0.9])
def test_a_torn_tar_gives_what_is_before_the_tear_and_one_complaint(tmp_path, suffix, kept):
    tar = write_tar(tmp_path / f"a{suffix}", sound([f"{i:02d}" for i in range(6)]))
    whole, content = read(tar), tar.read_bytes()
    tar.write_bytes(
        content[: int(kept * len(content))] if suffix == ".tar.gz" else content[: int(kept * whole[-1].end)]
    )
    *before, last = read(tar)
    assert last.key is None and "torn at byte" in last.flaw and last.name == f"a{suffix}"
    assert [e for e in before if not e.flaw] == whole[: len([e for e in before if not e.flaw])] and len(before) < 6
    assert read(tar, start=last.start) == [last]


def test_a_damaged_header_ends_the_tar_there_and_says_so(tmp_path):
    tar = write_tar(tmp_path / "a.tar", sound([f"{i:02d}" for i in range(6)]))
    whole, content = read(tar), bytearray(tar.read_bytes())
    content[whole[3].start + 5] ^= 255
    tar.write_bytes(content)
    *before, last = read(tar)
    assert before == whole[:3] and last.flaw == f"torn at byte {whole[3].start}: it has no end mark"


def test_a_scan_for_prompts_stops_where_no_sample_has_a_caption(tmp_path):
    write_tars(tmp_path, tars=5, samples=20)
    pairs = WebDatasetPairs(str(tmp_path), 16, caption_column="nothing")
    with pytest.raises(ValueError, match=r"51 of 51 samples so far .* skips 50: .*: \d-0\d\d \(no caption .noth"):
        heldout_prompts(pairs, enough=[4])


# Over HTTP.


class Server(SimpleHTTPRequestHandler):
    """Serves a folder; `ranges` as a real server does, `breaks` a connection in the middle of every answer."""

    ranges, breaks, requested, busy = True, False, [], []

    def do_HEAD(self):
        if self.busy:
            self.send_error(self.busy.pop())
        else:
            super().do_HEAD()

    def do_GET(self):
        if not Path(self.translate_path(self.path)).is_file():
            self.requested.append(self.path)
            return self.send_error(404)
        content = Path(self.translate_path(self.path)).read_bytes()
        requested = self.headers.get("Range") if self.ranges else None
        start = int(requested.removeprefix("bytes=").removesuffix("-")) if requested else 0
        self.requested.append(start)
        self.send_response(206 if requested else 200)
        rest = content[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: len(rest) // 2 + 1] if self.breaks and len(rest) > 3000 else rest)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.time, "sleep", lambda _: None)
    monkeypatch.setattr(Server, "requested", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_url_gives_what_the_file_gives_and_goes_on_by_a_range(tmp_path, served):
    (path,) = write_tars(tmp_path, tars=1)
    here, there = read(path), read(f"{served}/part-{{000..000}}.tar")
    assert here == there
    Server.requested.clear()
    assert read(f"{served}/part-000.tar", start=here[5].end) == here[6:] and Server.requested == [here[5].end]


@pytest.mark.parametrize(("ranges", "breaks"), [(True, True), (False, False), (False, True)])
def test_a_broken_connection_and_a_server_without_ranges_change_nothing(tmp_path, served, monkeypatch, ranges, breaks):
    monkeypatch.setattr(Server, "ranges", ranges)
    monkeypatch.setattr(Server, "breaks", breaks)
    (path,) = write_tars(tmp_path, tars=1)
    url = f"{served}/part-000.tar"
    if breaks and not ranges:
        with pytest.raises(OSError, match=r"part-000.tar cannot be read \(the connection ended at byte \d+ of \d+"):
            read(url)
        return
    whole = read(path)
    assert read(url) == whole and read(url, start=whole[5].end) == whole[6:]


def test_images_behind_urls_are_asked_for_again_where_a_connection_breaks_and_once_where_there_is_none(
    tmp_path, served, monkeypatch
):
    monkeypatch.setattr(Server, "breaks", True)
    (tmp_path / "a.png").write_bytes(picture("a", size=(64, 64)))
    assert image_cell({"bytes": None, "path": f"{served}/a.png"}) == (tmp_path / "a.png").read_bytes()
    assert len(Server.requested) > 1
    Server.requested.clear()
    with pytest.raises(OSError, match=r"gone.png cannot be read \(HTTP Error 404"):
        image_cell(f"{served}/gone.png")
    assert Server.requested == ["/gone.png"]


def test_a_dead_link_is_asked_twice_and_letters_that_no_url_has_are_quoted(tmp_path, served, monkeypatch):
    pauses = []
    monkeypatch.setattr(sources.time, "sleep", pauses.append)
    with pytest.raises(OSError, match=r"a.png cannot be read \(.*refused.*\)$"):
        image_cell("http://127.0.0.1:9/a.png")
    assert pauses == [0.5]
    (tmp_path / "ä b%.png").write_bytes(b"image")
    assert image_cell(f"{served}/ä b%25.png") == b"image"


def test_a_missing_url_is_reported_before_anything_is_read(tmp_path, served):
    with pytest.raises(ValueError, match=r"nothing.tar cannot be had \(HTTP 404"):
        _ = WebDatasetPairs(f"{served}/nothing.tar", 16).fingerprint
    with pytest.raises(ValueError, match="127.0.0.1:9.* cannot be had"):
        _ = WebDatasetPairs("http://127.0.0.1:9/a.tar", 16).fingerprint


def test_a_busy_server_is_asked_again(tmp_path, served):
    write_tars(tmp_path, tars=1)
    before = WebDatasetPairs(f"{served}/part-000.tar", 16).fingerprint
    Server.busy += [503, 429]
    assert WebDatasetPairs(f"{served}/part-000.tar", 16).fingerprint == before and not Server.busy
    Server.busy += 4 * [503]
    with pytest.raises(ValueError, match=r"part-000.tar cannot be had \(HTTP 503") as error:
        _ = WebDatasetPairs(f"{served}/part-000.tar?signature=secret", 16).fingerprint
    assert "secret" not in str(error.value)


def test_the_fingerprint_of_a_url_changes_with_what_the_server_says(tmp_path, served):
    write_tars(tmp_path, tars=1)
    before = WebDatasetPairs(f"{served}/part-000.tar?token=1", 16).fingerprint
    assert WebDatasetPairs(f"{served}/part-000.tar?token=2", 16).fingerprint == before
    write_tar(tmp_path / "part-000.tar", sound(["other"]))
    assert WebDatasetPairs(f"{served}/part-000.tar", 16).fingerprint != before
