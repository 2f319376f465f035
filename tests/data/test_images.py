"""Captioned folders and data sets: what is read, how it is cut, and one clear line for every mistake."""

import io
import json
import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from slimstep.data.cache import cache_pairs
from slimstep.data.images import BrokenImageError, HubPairs, ImageFolderPairs
from slimstep.data.pixels import decode_rgb


def picture(colour="red", size=(24, 16), mode="RGB"):
    return Image.new(mode, size, colour)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """20 images, 10 of them in a folder of its own, and metadata.jsonl."""
    (tmp_path / "deep/er").mkdir(parents=True)
    names = [f"{'deep/er/' * (i % 2)}{i:02d}.png" for i in range(20)]
    for i, name in enumerate(names):
        picture((10 * i, 0, 0)).save(tmp_path / name)
    write_rows(tmp_path / "metadata.jsonl", [{"file_name": name, "text": f"number {name[-6:-4]}"} for name in names])
    return tmp_path


def names_of(pairs):
    return [name for name, _ in pairs.pairs]


# What is read.


def test_images_meet_their_captions(folder):
    pairs = ImageFolderPairs(folder, 8, split="all")
    assert len(pairs) == 20
    for i in range(20):
        item = pairs[i]
        assert item["image"].shape == (3, 8, 8) and item["image"].dtype == torch.uint8
        assert item["caption"] == pairs.caption(i) == f"number {int(item['image'][0, 0, 0]) // 10:02d}"


def test_the_same_captions_in_any_layout_are_the_same_pairs(folder, tmp_path_factory):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    expected = [pair for pair in ImageFolderPairs(folder, 8, split="all").pairs]
    (folder / "metadata.jsonl").unlink()

    table = "file_name,text\n" + "".join(f'{row["file_name"]},"{row["text"]}"\n' for row in rows)
    (folder / "metadata.csv").write_text(table)
    assert ImageFolderPairs(folder, 8, split="all").pairs == expected
    (folder / "metadata.csv").unlink()

    datasets.Dataset.from_list(rows).to_parquet(folder / "metadata.parquet")
    assert ImageFolderPairs(folder, 8, split="all").pairs == expected
    (folder / "metadata.parquet").unlink()

    inner = [{**row, "file_name": row["file_name"].removeprefix("deep/")} for row in rows if "/" in row["file_name"]]
    write_rows(folder / "deep/metadata.jsonl", inner)
    for row in rows:
        if "/" not in row["file_name"]:
            (folder / row["file_name"]).with_suffix(".txt").write_text(row["text"] + "\n")
    assert ImageFolderPairs(folder, 8, split="all").pairs == expected


def test_what_hugging_face_reads_from_the_folder_we_read_too(folder):
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=folder.parent / "hf")
    ours = ImageFolderPairs(folder, 16, split="all")
    assert sorted(theirs["text"]) == sorted(ours.caption(i) for i in range(len(ours)))


def test_the_caption_column_can_be_named_and_several_rows_caption_one_image(tmp_path):
    picture().save(tmp_path / "a.jpg")
    rows = [{"file_name": "a.jpg", "text": "no", "blip": f"caption {i}"} for i in range(3)]
    write_rows(tmp_path / "metadata.jsonl", rows)
    pairs = ImageFolderPairs(tmp_path, 8, split="all", caption_column="blip")
    assert [pairs.caption(i) for i in range(3)] == ["caption 0", "caption 1", "caption 2"]


def test_the_held_out_split_depends_on_file_names_alone(folder):
    train, heldout = (ImageFolderPairs(folder, 8, split=s, heldout_fraction=0.3) for s in ("train", "heldout"))
    assert sorted(names_of(train) + names_of(heldout)) == names_of(ImageFolderPairs(folder, 8, split="all"))
    assert not set(names_of(train)) & set(names_of(heldout))
    kept = names_of(heldout)[0]
    rows = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    gone = names_of(train)[0]
    (folder / gone).unlink()
    (folder / "metadata.jsonl").write_text("".join(row for row in rows if gone not in row))
    assert kept in names_of(ImageFolderPairs(folder, 8, split="heldout", heldout_fraction=0.3))
    assert names_of(ImageFolderPairs(folder, 8, split="train", heldout_fraction=0)) == sorted(
        names_of(train)[1:] + names_of(heldout)
    )


@pytest.mark.parametrize("change", ["caption", "image", "resolution", "crop", "split"])
def test_the_fingerprint_changes_with_what_the_items_hold(folder, change):
    before = ImageFolderPairs(folder, 8, split="all").fingerprint
    options = {"resolution": 8, "split": "all"}
    if change == "caption":
        metadata = folder / "metadata.jsonl"
        metadata.write_text(metadata.read_text().replace("number 03", "number three"))
    elif change == "image":
        picture("blue", (30, 30)).save(folder / "00.png")
    else:
        options[change] = {"resolution": 16, "crop": "random", "split": "train"}[change]
    assert ImageFolderPairs(folder, **options).fingerprint != before


def test_the_fingerprint_survives_a_move_of_the_folder(folder):
    before = ImageFolderPairs(folder, 8).fingerprint
    assert ImageFolderPairs(folder.rename(folder.parent / "moved"), 8).fingerprint == before


# Links, and several tables.


def names_in_all(root, **options):
    return names_of(ImageFolderPairs(root, 8, split="all", **options))


@pytest.mark.parametrize("link", ["deep/up", "deep/er/here", "itself"])
@pytest.mark.parametrize("target", [".", "..", "deep"])
def test_a_link_to_a_folder_that_is_read_anyway_adds_nothing(folder, caplog, link, target):
    before = names_in_all(folder)
    (folder / link).symlink_to((folder / target).resolve())
    assert names_in_all(folder) == before
    assert f"not read in {folder}: {link}" in caplog.text and len(caplog.records) == 1
    ImageFolderPairs(folder, 8, split="heldout")
    assert len(caplog.records) == 1


def test_links_in_a_ring_end_and_lead_to_every_image_once(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        picture().save(tmp_path / name / f"{name}.png")
        (tmp_path / name / f"{name}.txt").write_text(name)
    root = tmp_path / "root"
    root.mkdir()
    (root / "first").symlink_to(tmp_path / "a")
    for name, following in zip("abc", "bca", strict=True):
        (tmp_path / name / "next").symlink_to(tmp_path / following)
        (tmp_path / name / "prior").symlink_to(tmp_path / "abc"["abc".index(name) - 1])
    assert sorted(name[-5:] for name in names_in_all(root)) == ["a.png", "b.png", "c.png"]
    assert names_in_all(root)[0] == "first/a.png"


def test_linked_folders_keep_their_own_names_and_are_read_under_the_first(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    for name in ("one", "two"):
        (root / name).symlink_to(folder)
    assert names_in_all(root) == [f"one/{name}" for name in names_in_all(folder)]
    (root / "alone").mkdir()
    picture().save(root / "alone/a.png")
    (root / "alone/a.txt").write_text("a")
    (root / "Link").symlink_to(root / "alone")  # comes first by name; a folder's own place counts
    assert names_in_all(root)[0] == "alone/a.png" and len(names_in_all(root)) == 21


def test_links_to_nothing_are_reported(folder, caplog):
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "ring.jpg").symlink_to(folder / "ring.jpg")
    (folder / "more").symlink_to(folder / "nowhere")
    pairs = ImageFolderPairs(folder, 8, split="all")
    assert len(pairs) == 20 and pairs.fingerprint
    assert "gone.png is a link to nothing; ring.jpg is a link to nothing" in caplog.text
    assert "more (a link to nothing)" in caplog.text


def test_an_image_of_two_names_is_in_one_split(folder):
    heldout = names_of(ImageFolderPairs(folder, 8, split="heldout", heldout_fraction=0.3))
    for k in range(20):
        (folder / f"{k:02d}-again.png").symlink_to(folder / f"{'deep/er/' * (k % 2)}{k:02d}.png")
        (folder / f"{k:02d}-again.txt").write_text(f"again {k}")
    both = names_of(ImageFolderPairs(folder, 8, split="heldout", heldout_fraction=0.3))
    assert {name for name in both if "again" not in name} == set(heldout)
    assert {name[:2] for name in both if "again" in name} == {name[-6:-4] for name in heldout}


@pytest.mark.parametrize("other", ["metadata.csv", "metadata.parquet", "deep/metadata.jsonl"])
def test_two_tables_that_caption_one_image_are_reported(folder, other):
    rows = [{"file_name": "er/01.png" if "deep" in other else "deep/er/01.png", "text": "another"}]
    if other.endswith("csv"):
        (folder / other).write_text(f"file_name,text\n{rows[0]['file_name']},another\n")
    elif other.endswith("parquet"):
        datasets.Dataset.from_list(rows).to_parquet(folder / other)
    else:
        write_rows(folder / other, rows)
    with pytest.raises(ValueError, match=r"both caption deep/er/01.png: keep one of the two files") as error:
        ImageFolderPairs(folder, 8)
    assert other in one_line(error) and f"{folder}/metadata.jsonl" in one_line(error)


# How pixels come out.


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "kind", "rgb"),
    [
        (picture((10, 20, 30, 255), mode="RGBA"), "PNG", (10, 20, 30)),
        (picture((10, 20, 30, 0), mode="RGBA"), "PNG", (255, 255, 255)),
        (picture((0, 0, 0, 51), mode="RGBA"), "PNG", (204, 204, 204)),
        (picture(77, mode="L"), "PNG", (77, 77, 77)),
        (picture((77, 0), mode="LA"), "PNG", (255, 255, 255)),
        (picture(1, mode="1"), "PNG", (255, 255, 255)),
        (picture((200, 100, 0)).quantize(4), "PNG", (200, 100, 0)),
        (picture((0, 255, 255, 0), mode="CMYK"), "TIFF", (255, 0, 0)),
        (Image.fromarray(np.full((16, 24), 0x8080, np.uint16)), "PNG", (128, 128, 128)),
        (Image.fromarray(np.full((16, 24), 0x8080, np.uint16)), "TIFF", (128, 128, 128)),
        (Image.fromarray(np.full((16, 24), 0x80, np.uint16)), "PNG", (0, 0, 0)),
    ],
)
def test_every_mode_becomes_opaque_eight_bit_rgb(image, kind, rgb):
    assert np.array(decode_rgb(encoded(image, kind), "x")).reshape(-1, 3).tolist() == [list(rgb)] * 24 * 16


def test_a_transparent_palette_colour_becomes_white():
    image = picture((200, 100, 0)).quantize(4)
    decoded = decode_rgb(encoded(image, "PNG", transparency=image.getpixel((0, 0))), "x")
    assert decoded.getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path):
    image = picture("black", (24, 16))
    image.paste("white", (0, 0, 12, 16))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: left becomes top
    image.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("a caption")
    pixels = ImageFolderPairs(tmp_path, 16, split="all")[0]["image"]
    assert pixels[:, 0].min() > 200 and pixels[:, -1].max() < 50


def test_the_shorter_side_is_resized_and_the_middle_kept(tmp_path):
    image = picture("black", (60, 20))
    image.paste("white", (20, 0, 40, 20))
    image.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a caption")
    assert ImageFolderPairs(tmp_path, 20, split="all")[0]["image"].min() == 255
    assert ImageFolderPairs(tmp_path, 10, split="all")[0]["image"][:, 5, 5].min() == 255
    pixels = ImageFolderPairs(tmp_path, 20, split="all", crop="random")[0]["image"]
    assert pixels.min() == 0
    assert torch.equal(pixels, ImageFolderPairs(tmp_path, 20, split="all", crop="random")[0]["image"])


# Mistakes.


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        ImageFolderPairs(tmp_path / "nowhere", 8)


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(ValueError, match=r"holds no images \(.png, .jpg"):
        ImageFolderPairs(tmp_path, 8)


def test_captions_of_missing_images_are_counted_and_named(folder):
    for i in range(0, 10, 2):
        (folder / f"{i:02d}.png").unlink()
    with pytest.raises(ValueError, match="5 of 20 images and captions in .* no pair, and at most 4 may be") as error:
        ImageFolderPairs(folder, 8, max_broken=4)
    assert "metadata.jsonl, line 1, names 00.png, which is not in" in one_line(error)


def test_images_without_captions_are_counted_and_named(folder):
    for name in ("x.png", "y.JPG"):
        picture().save(folder / name)
    with pytest.raises(ValueError, match=r"2 of 22 images .*: x.png has no caption, .*; y.JPG has no") as error:
        ImageFolderPairs(folder, 8, max_broken=0)
    one_line(error)


def test_what_is_no_pair_is_reported_once_and_passed_over_up_to_max_broken(folder, caplog):
    (folder / "00.png").unlink()
    picture().save(folder / "x.png")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "x.png", "text": ""}) + "\n")
    pairs = ImageFolderPairs(folder, 8, split="all")
    assert len(pairs) == 19 and not {"00.png", "x.png"} & {name for name, _ in pairs.pairs}
    ImageFolderPairs(folder, 8, split="heldout")
    assert [record.message.split(" in ")[0] for record in caplog.records] == ["2 of 21 images and captions"]
    assert "line 1, names 00.png" in caplog.text and "line 21, the caption of x.png is empty" in caplog.text


@pytest.mark.parametrize("text", ["", "  ", None])
def test_an_empty_caption_is_named(folder, text):
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "00.png", "text": text}) + "\n")
    with pytest.raises(ValueError, match="metadata.jsonl, line 21, the caption of 00.png is empty") as error:
        ImageFolderPairs(folder, 8, max_broken=0)
    one_line(error)


def test_an_empty_caption_file_is_named(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ValueError, match="caption file .*a.txt is empty"):
        ImageFolderPairs(tmp_path, 8)


@pytest.mark.parametrize("column", ["blip", None])
def test_an_unknown_caption_column_is_reported_with_the_choices(folder, column):
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"text"', '"label"'))
    with pytest.raises(ValueError, match="its columns are file_name, label") as error:
        ImageFolderPairs(folder, 8, caption_column=column)
    one_line(error)


def test_metadata_without_file_names_is_reported(folder):
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("file_name", "image"))
    with pytest.raises(ValueError, match="line 1, has no column 'file_name'; its columns are image, text"):
        ImageFolderPairs(folder, 8)


def test_metadata_that_is_not_json_is_reported(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "a"}\n{"file_name": \n')
    with pytest.raises(ValueError, match="metadata.jsonl, line 2 is not JSON"):
        ImageFolderPairs(folder, 8)


def test_an_empty_split_and_unknown_options_are_reported(folder):
    with pytest.raises(ValueError, match="the heldout split of .* is empty.*heldout_fraction=0;"):
        ImageFolderPairs(folder, 8, split="heldout", heldout_fraction=0)
    with pytest.raises(ValueError, match=r"the (train|heldout) split .* is empty.*; data.heldout_fraction=") as error:
        for split in ("train", "heldout"):
            ImageFolderPairs(folder, 8, split=split, heldout_fraction=1e-6 if split == "heldout" else 0)
    fraction, held = re.search(r"data.heldout_fraction=(\S+) holds out (\d+)", one_line(error)).groups()
    assert len(ImageFolderPairs(folder, 8, split="heldout", heldout_fraction=float(fraction))) == int(held) >= 4
    with pytest.raises(ValueError, match="split='test' is unknown; choose from train, heldout, all"):
        ImageFolderPairs(folder, 8, split="test")
    with pytest.raises(ValueError, match="crop='middle' is unknown; choose from center, random"):
        ImageFolderPairs(folder, 8, crop="middle")
    with pytest.raises(ValueError, match="heldout_fraction=2 must lie in"):
        ImageFolderPairs(folder, 8, heldout_fraction=2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("keep", [0, 20, 0.5])
def test_a_torn_image_is_named(tmp_path, kind, keep):
    noise = Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    (tmp_path / "torn.png").write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    (tmp_path / "torn.txt").write_text("a caption")
    with pytest.raises(BrokenImageError, match=r"^torn.png \(.+\)$"):
        ImageFolderPairs(tmp_path, 8, split="all")[0]


def test_pixels_without_a_defined_white_are_named():
    with pytest.raises(BrokenImageError, match="mode F have no defined white"):
        decode_rgb(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "x")


def test_the_cache_skips_torn_images_up_to_max_broken(folder, pipeline, tmp_path_factory):
    (folder / "04.png").write_bytes(b"torn")
    (folder / "06.png").write_bytes(b"torn")
    cache = tmp_path_factory.mktemp("cache")
    for max_broken in (2, 0.1):
        pairs = ImageFolderPairs(folder, 8, split="all", max_broken=max_broken)
        cached = cache_pairs(pairs, pipeline, cache)
        assert len(cached) == 18 and cached.broken[0].startswith("04.png (")
    with pytest.raises(ValueError, match=r"2 of 20 images cannot be read.*at most 0 .*04.png \(.*06.png") as error:
        cache_pairs(ImageFolderPairs(folder, 8, split="all", max_broken=0), pipeline, cache)
    one_line(error)


# Data sets of the hub.


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A data set of ten rows as `save_to_disk` leaves it."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    pictures, words = [picture((10 * i, 0, 0)) for i in range(10)], [[f"row {i}", "other"] for i in range(10)]
    rows = {"picture": pictures, "words": words}
    features = datasets.Features({"picture": datasets.Image(), "words": datasets.List(datasets.Value("string"))})
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features)).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_data_set_gives_its_images_and_first_captions(saved):
    pairs = HubPairs(str(saved), 8, "all", image_column="picture", caption_column="words")
    assert [pairs[i]["caption"] for i in range(10)] == [f"row {i}" for i in range(10)]
    assert [int(pairs[i]["image"][0, 0, 0]) for i in range(10)] == [10 * i for i in range(10)]


def test_splits_of_a_data_set_are_disjoint_and_reproducible(saved):
    columns = {"image_column": "picture", "caption_column": "words"}
    train, heldout = (HubPairs(str(saved), 8, s, 0.4, **columns) for s in ("train", "heldout"))
    assert sorted(train.numbers + heldout.numbers) == list(range(10))
    assert HubPairs(str(saved), 8, "train", 0.4, **columns).fingerprint == train.fingerprint != heldout.fingerprint
    named = HubPairs(str(saved), 8, "heldout", heldout_subset="train", **columns)
    assert len(named) == 10


def test_local_parquet_files_are_a_data_set_too(saved, tmp_path):
    rows = datasets.load_from_disk(str(saved))["train"].rename_columns({"picture": "image", "words": "text"})
    (tmp_path / "files").mkdir()
    rows.to_parquet(tmp_path / "files/train.parquet")
    datasets.config.HF_DATASETS_CACHE, before = tmp_path / "hf", datasets.config.HF_DATASETS_CACHE
    try:
        assert HubPairs(str(tmp_path / "files"), 8, "all")[7]["caption"] == "row 7"
    finally:
        datasets.config.HF_DATASETS_CACHE = before


def test_mistakes_about_a_data_set_are_one_line(saved):
    with pytest.raises(ValueError, match="data set no/such, split 'train', cannot be loaded.*save_to_disk") as error:
        HubPairs("no/such", 8)
    one_line(error)
    with pytest.raises(ValueError, match="has no split 'test'; its splits are train"):
        HubPairs(str(saved), 8, subset="test")
    with pytest.raises(ValueError, match="has no column 'image'; its columns are picture, words: data.image_column=…"):
        HubPairs(str(saved), 8, caption_column="words")
    with pytest.raises(ValueError, match="columns text, caption, prompt; .*data.caption_column=….*picture, words"):
        HubPairs(str(saved), 8, image_column="picture")
    with pytest.raises(ValueError, match="column 'words' of .* holds no images"):
        HubPairs(str(saved), 8, image_column="words", caption_column="words")


def test_rows_without_a_caption_or_image_are_named_or_left_out(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [picture(), None, picture()], "text": ["a", "b", ""]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="column 'text' of row 2 is empty.*skip_empty=true"):
        HubPairs(str(tmp_path / "rows"), 8, "all")
    pairs = HubPairs(str(tmp_path / "rows"), 8, "all", skip_empty=True)
    assert len(pairs) == 2
    with pytest.raises(BrokenImageError, match="row 1 "):
        pairs[1]


# Photographs.


def test_the_photo_folder_can_be_trained_on(photo_folder, pipeline, tmp_path):
    train, heldout = (ImageFolderPairs(photo_folder, 64, split=s) for s in ("train", "heldout"))
    assert len(train) + len(heldout) >= 200 and len(heldout) >= 20
    assert len({train.caption(i) for i in range(len(train))}) > 100
    assert train[0]["image"].float().std() > 10
    cached = cache_pairs(heldout, pipeline, tmp_path)
    assert cached[0]["latents"].shape == (4, 16, 16)
