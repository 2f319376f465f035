"""Prompt sets: order is identity, files of every kind give the same set, mistakes name their line."""

import csv
import json
import time

import pytest
import torch
from datasets import Dataset

from slimstep.data.prompts import PromptSet, disjoint_prompts, heldout_prompts, read_prompts
from slimstep.data.tables import tsv_rows

TEXTS = ("a cat", 'a "quoted", dog', "ein Bär", "two lines")


def test_the_hash_is_of_the_texts_and_their_order():
    a = PromptSet(("x", "y"), "a")
    assert a.hash == PromptSet(("x", "y"), "b").hash
    assert len(a.hash) == 12
    assert a.hash not in {PromptSet(texts, "a").hash for texts in (("y", "x"), ("xy",), ("x",), ("x", "y", "y"))}


def test_takes_that_do_not_overlap_are_disjoint_and_make_the_whole():
    prompts = PromptSet(tuple("abcdef"), "letters")
    first, second = prompts.take(3), prompts.take(3, offset=3)
    assert first.prompts + second.prompts == prompts.prompts
    assert first.name == "letters[0:3]"


@pytest.mark.parametrize(("n", "offset"), [(7, 0), (3, 4), (0, 0), (2, -1)])
def test_taking_more_than_there_is_tells_how_many_there_are(n, offset):
    with pytest.raises(ValueError, match=rf"n={n}, offset={offset}\), it holds 6"):
        PromptSet(tuple("abcdef"), "letters").take(n, offset)


def test_an_empty_prompt_is_named():
    with pytest.raises(ValueError, match="prompt 1 of set 'x' is empty"):
        PromptSet(("a", " "), "x")
    with pytest.raises(ValueError, match="'x' holds no prompts"):
        PromptSet((), "x")


def write(path, texts, column="caption"):
    if path.suffix == ".txt":
        path.write_text("\n".join(texts) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
    elif path.suffix == ".parquet":
        Dataset.from_dict({"id": range(len(texts)), column: list(texts)}).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([("id", column), *enumerate(texts)])
    return path


KINDS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_prompts(tmp_path, kind):
    prompts = read_prompts(write(tmp_path / f"set{kind}", TEXTS))
    assert prompts.prompts == TEXTS
    assert prompts.name == "set"


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_prompt_in_a_file_is_named_by_its_place(tmp_path, kind):
    path = write(tmp_path / f"set{kind}", ("a", "", "b"))
    place = {".csv": "line 3", ".tsv": "line 3", ".parquet": "row 2"}.get(kind, "line 2")
    with pytest.raises(ValueError, match=f"set{kind}: {place} is empty"):
        read_prompts(path)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_column_can_be_named_and_an_unknown_one_is_reported_with_the_choices(tmp_path, kind):
    path = write(tmp_path / f"set{kind}", TEXTS, column="words")
    assert read_prompts(path, column="words").prompts == TEXTS
    with pytest.raises(ValueError, match=r"columns text, caption, prompt; .*, data.prompt_column=….*id, words"):
        read_prompts(path)
    with pytest.raises(ValueError, match=r"name the one to use, latents.prompt_column=…"):
        read_prompts(path, key="latents.prompt_column")
    with pytest.raises(ValueError, match="no column 'nope'; its columns are id, words"):
        read_prompts(path, column="nope")


@pytest.mark.parametrize("kind", [".txt", ".json"])
def test_a_column_of_a_file_without_columns_is_reported(tmp_path, kind):
    (tmp_path / f"set{kind}").write_text("a")
    with pytest.raises(ValueError, match=rf"^data.prompt_column=words: .*set{kind} has no columns"):
        read_prompts(tmp_path / f"set{kind}", "words")


ODD_QUOTES = (
    '"a cat', 'a dog"', 'a 5" tv', '"Deep" on a sign', '"', '""', '"a" or "b"', 'a "b', "'c", '"d ""e"', '""f"', "g",
)  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("header", ["id\tcaption", "caption\tid"])
def test_a_quote_in_a_tsv_swallows_nothing(tmp_path, header, end):
    rows = [f"{k}\t{text}" if header[0] == "i" else f"{text}\t{k}" for k, text in enumerate(ODD_QUOTES)]
    (tmp_path / "set.tsv").write_text(end.join([header, *rows, ""]), newline="")
    read = [row["caption"] for _, row in tsv_rows(tmp_path / "set.tsv")]
    means = {'""': "", '"d ""e"': 'd "e'}  # what is quoted as a whole is read as it was written
    assert read == [means.get(text, text) for text in ODD_QUOTES]


@pytest.mark.parametrize("text", [*ODD_QUOTES, "a\tb", 'a"\t"b', '"\t"'])
def test_what_a_writer_of_tables_quotes_comes_back(tmp_path, text):
    for kind in (".csv", ".tsv"):
        path = write(tmp_path / f"set{kind}", ["first", text, "last"])
        assert read_prompts(path).prompts == ("first", text, "last")


def test_a_tsv_in_the_layout_of_published_prompt_sets_is_read(tmp_path):
    rows = ["Prompt\tCategory\tNote", '"tall" letters\tText\t', "a \"bear\"\tAnimals\tsays \"hi", "x\tAbstract"]
    (tmp_path / "parti.tsv").write_text("\n".join(rows) + "\n\n")
    assert read_prompts(tmp_path / "parti.tsv").prompts == ('"tall" letters', 'a "bear"', "x")
    for line, content in ((2, 'caption\tid\n"two\nlines"\t1\n'), (3, 'id\tcaption\n1\t"two\nlines"\n')):
        (tmp_path / "lines.tsv").write_text(content)
        with pytest.raises(ValueError, match=f"line {line} has fewer fields .* a row of a .tsv is one line"):
            read_prompts(tmp_path / "lines.tsv")
    (tmp_path / "tabs.tsv").write_text("caption\tid\na\tb\t1\n")
    with pytest.raises(ValueError, match="tabs.tsv, line 2 has more fields than the header"):
        read_prompts(tmp_path / "tabs.tsv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['1,"a cat', "2,a dog", "3,a bird"], "the text from line 2 on is no row of a table: unexpected end of data"),
        (['1,"a cat', "2,a dog", '3,a 5" tv'], "the text from line 2 on is no row of a table: ',' expected after '\"'"),
        (["1,a", '2,"Deep" on a sign', "3,b"], "line 3 is no row of a table: ',' expected after '\"'"),
        (["1,a", '2,"say \\"hi\\""', "3,b"], "line 3 is no row of a table"),
    ],
)
def test_an_open_quote_in_a_csv_is_reported_with_the_line_it_opens_in(tmp_path, rows, message):
    (tmp_path / "set.csv").write_text("\n".join(["id,caption", *rows, ""]))
    with pytest.raises(ValueError, match=f"{message}.*; a quote inside a text is written twice"):
        read_prompts(tmp_path / "set.csv")


def test_rows_that_seem_to_lie_inside_a_quoted_text_are_reported_once(tmp_path, caplog):
    (tmp_path / "set.csv").write_text('id,caption\n1,"a cat\n2,a dog"\n3,"two\nlines"\n')
    for _ in range(2):
        assert read_prompts(tmp_path / "set.csv").prompts == ("a cat\n2,a dog", "two\nlines")
    assert [record.message.split("set.csv")[1][:31] for record in caplog.records] == [": lines 2 to 3 are one row, by "]


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
def test_a_column_of_two_names_is_reported(tmp_path, kind):
    separator = "," if kind == ".csv" else "\t"
    (tmp_path / f"set{kind}").write_text(separator.join(["caption", "id", "caption"]) + "\n")
    with pytest.raises(ValueError, match=rf"set{kind} has several columns 'caption'"):
        read_prompts(tmp_path / f"set{kind}")


def coco(path, images, annotations):
    """A file with the sections that COCO's captions_val2017.json has."""
    sections = {"info": {}, "licenses": [], "images": [{"id": id, "file_name": f"{id:012d}.jpg"} for id in images]}
    rows = [{"image_id": image, "id": id, "caption": caption} for image, id, caption in annotations]
    path.write_text(json.dumps({**sections, "annotations": rows}))
    return path


def test_coco_captions_give_each_image_its_first_one_whatever_the_order_of_the_file(tmp_path):
    images = [285, 139, 632, 724]  # the last has no caption; image 9 is not listed
    annotations = [(632, 3, "third"), (285, 770, "a bear.\n"), (139, 41, "later"), (139, 7, "a room "), (9, 1, "gone")]
    prompts = read_prompts(coco(tmp_path / "captions_val2017.json", images, annotations))
    assert prompts.prompts == ("a room", "a bear.", "third") and prompts.name == "captions_val2017"
    again = read_prompts(coco(tmp_path / "other.json", images[::-1], annotations[::-1]))
    assert again.hash == prompts.hash


def test_coco_captions_at_full_size_are_read_in_a_moment(tmp_path):
    images = range(40_000)
    annotations = [(k, 5 * k + j, f"caption {j} of image {k}") for k in images for j in range(5)]
    path = coco(tmp_path / "captions_val2014.json", images, annotations)
    start = time.process_time()
    prompts = read_prompts(path)
    assert time.process_time() - start < 10
    assert len(prompts) == 40_000 and prompts[39_999] == "caption 0 of image 39999"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "set.json is not JSON"),
        ('["a", "b"]', "set.json is no COCO captions file.*one JSON object per line is .jsonl"),
        ('{"text": "a"}', "set.json is no COCO captions file.*KeyError 'images'"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "id": 2, "bbox": []}]}', "KeyError 'caption'"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "id": 2, "caption": " "}]}', "annotation 2 is empty"),
        ('{"images": [{"id": 1}], "annotations": []}', "set.json holds no prompts"),
    ],
)
def test_json_that_is_no_coco_captions_file_is_reported(tmp_path, content, expected):
    (tmp_path / "set.json").write_text(content)
    with pytest.raises(ValueError, match=expected) as error:
        read_prompts(tmp_path / "set.json")
    assert "\n" not in str(error.value)


def test_files_that_are_not_prompts_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.txt does not exist"):
        read_prompts(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="unknown kind '.doc'; use one of .txt, .jsonl"):
        read_prompts(tmp_path / "set.doc")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl holds no prompts"):
        read_prompts(tmp_path / "empty.jsonl")
    (tmp_path / "latin.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8"):
        read_prompts(tmp_path / "latin.txt")
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ValueError, match="bad.parquet cannot be read as a parquet file"):
        read_prompts(tmp_path / "bad.parquet")
    (tmp_path / "separators.csv").write_text("caption\na\u2028b\x0bc\n\"two\nlines\"\n")
    assert read_prompts(tmp_path / "separators.csv").prompts == ("a\u2028b\x0bc", "two\nlines")
    (tmp_path / "commas.csv").write_text("caption\na, b\n")
    with pytest.raises(ValueError, match="line 2 has more fields than the header"):
        read_prompts(tmp_path / "commas.csv")


class TextPairs:
    captions = tuple("abcab")

    def __len__(self):
        return len(self.captions)

    def caption(self, index):
        return self.captions[index]


def test_held_out_prompts_are_distinct_captions_in_a_fixed_order():
    prompts = heldout_prompts(TextPairs())
    assert sorted(prompts) == ["a", "b", "c"]
    assert heldout_prompts(TextPairs(), 2).prompts == prompts.prompts[:2]
    with pytest.raises(ValueError, match=r"4 prompts were asked for, the 5 pairs have 3 distinct captions: .*=3 or"):
        heldout_prompts(TextPairs(), 4)


def test_held_out_prompts_come_from_any_pair_set(noise_pairs):
    assert set(heldout_prompts(noise_pairs())) == set(noise_pairs.captions)


def test_ranking_and_judging_share_no_prompt_however_few_there_are():
    ample = PromptSet(tuple("abcdef"), "ample")
    assert [half.prompts for half in disjoint_prompts(ample, 2, 3)] == [("a", "b"), ("c", "d", "e")]
    scarce = PromptSet(tuple("abcdabc"), "scarce")
    first, second = disjoint_prompts(scarce, 4, 8)
    assert (len(first), len(second)) == (4, 8)
    assert not set(first) & set(second) and set(first) | set(second) == set("abcd")
    with pytest.raises(ValueError, match="'one' has 1 distinct prompts.*data.prompt_file=FILE"):
        disjoint_prompts(PromptSet(("a", "a"), "one"), 1, 1)


def test_what_is_left_out_is_not_evaluated_on_and_few_prompts_are_repeated():
    letters = PromptSet(tuple("abcda"), "letters")
    assert letters.without({"b", "z"}, 2).prompts == ("a", "c")
    assert letters.without({"b"}, 5).prompts == ("a", "c", "d", "a", "c")
    with pytest.raises(ValueError, match="'letters' has 1 prompts that blocks were not ranked on.*data.prompt_file"):
        letters.without(set("bcd"), 2)


def test_a_repeated_text_counts_once_with_the_mean_of_its_noises():
    prompts = PromptSet(("a", "b", "a"), "repeated")
    assert prompts.distinct == ("a", "b")
    values = torch.tensor([[1.0, 5.0, 3.0], [0.0, 1.0, 0.0]])
    assert prompts.by_text(values).tolist() == [[2.0, 5.0], [0.0, 1.0]]
