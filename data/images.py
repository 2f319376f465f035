"""Anybody's images with captions: a folder of them, or any data set that Hugging Face `datasets` reads.

Images are decoded when asked for. One that cannot be read raises BrokenImageError, naming it; `data/cache.py` counts
those and skips them, up to `allowed_broken`.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from slimstep.data.folder import Contents, few, read_folder
from slimstep.data.pixels import BrokenImageError, check_framing, cut_out, decode_rgb
from slimstep.data.sources import is_url, read_whole
from slimstep.data.tables import caption_column as find_caption_column
from slimstep.data.tables import caption_text, existing_column
from slimstep.engine.resolution import Resolution

SPLITS = ("train", "heldout", "all")
log = logging.getLogger("slimstep")
ALWAYS_SKIPPED = 10  # samples, where a share of them may be
FEWEST_PROMPTS = 4  # two to rank blocks on, and two to evaluate on


class CaptionedImages:
    """What both sources share; item i: {"image": uint8 [3, H, W] of the resolution, "caption": str}."""

    def __post_init__(self) -> None:
        check_framing(self.resolution, self.crop)

    @property
    def allowed_broken(self) -> int:
        """How many images may turn out unreadable."""
        return allowed_of(len(self), self.max_broken)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        source, name = self.source(index)
        image = cut_out(decode_rgb(source, name), self.resolution, self.crop, name)
        return {"image": image, "caption": self.caption(index)}


@dataclass(eq=False)
class ImageFolderPairs(CaptionedImages):
    """The images under `root`, captioned by metadata files or .txt files as `data/folder.py` tells.

    `split` "heldout" holds the images whose path under `root` hashes into `heldout_fraction`, "train" the others, "all"
    both. `caption_column` may be left out where exactly one of text, caption, prompt is there.
    Images without a caption, empty captions and captions of missing images are reported and passed over, up to
    `max_broken`. Raises FileNotFoundError or ValueError, in one line, for more of them, a missing root, no images, an
    unknown column, an empty split.
    """

    root: str | Path
    resolution: Resolution
    split: str = "train"
    heldout_fraction: float = 0.1
    caption_column: str | None = None
    crop: str = "center"
    max_broken: float = 0.01
    KIND: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        root = self.root = Path(self.root)
        contents = self.read()
        everything, flaws = contents.pairs, contents.flaws
        self._report_flaws(flaws, len(everything) + len(flaws), told_before=self.split == "heldout")
        if contents.passed_over and self.split != "heldout":
            log.warning("not read in %s: %s", root, few(contents.passed_over))
        names = [contents.first_names[name] for name, _ in everything]
        chosen = split_of(names, self.split, self.heldout_fraction, f"{self.KIND} folder {root}")
        self.pairs = [everything[i] for i in chosen]

    def read(self) -> Contents:
        return read_folder(self.root, self.caption_column)

    def _report_flaws(self, flaws: list[str], of: int, told_before: bool) -> None:
        allowed = allowed_of(of, self.max_broken)
        if len(flaws) > allowed:
            summary = f"{len(flaws)} of {of} {self.KIND}s and captions in {self.root} are no pair"
            way = "repair them, or raise data.max_broken"
            raise ValueError(f"{summary}, and at most {allowed} may be passed over: {few(flaws)}; {way}")
        if flaws and not told_before:
            counts = f"{len(flaws)} of {of} {self.KIND}s and captions"
            log.warning("%s in %s are passed over: %s", counts, self.root, few(flaws))

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any name, size, time of change or caption of the images, and with how they are cut."""
        sha = hashlib.sha256(json.dumps([self.resolution, self.crop]).encode())
        for name, caption in self.pairs:
            stat = (self.root / name).stat()
            sha.update(json.dumps([name, stat.st_size, stat.st_mtime_ns, caption]).encode())
        return f"imagefolder-1/{sha.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.pairs)

    def source(self, index: int) -> tuple[Path, str]:
        name = self.pairs[index][0]
        return self.root / name, name

    def caption(self, index: int) -> str:
        """The caption alone, without decoding the image."""
        return self.pairs[index][1]


@dataclass(eq=False)
class HubPairs(CaptionedImages):
    """A data set of the Hugging Face hub, a local copy of one (a folder of its files, or one made by `save_to_disk`).

    `subset` is the data set's own split, "train[:10%]" included. `split` "heldout" holds the rows whose number hashes
    into `heldout_fraction`, or all of `heldout_subset` where that is given. Of several captions in a cell the first is
    taken; `skip_empty` leaves out rows without one, which are an error otherwise.
    Raises ValueError, in one line, for a name that cannot be loaded (offline too), an unknown column, an empty caption.
    """

    name: str
    resolution: Resolution
    split: str = "train"
    heldout_fraction: float = 0.1
    image_column: str = "image"
    caption_column: str | None = None
    subset: str = "train"
    heldout_subset: str | None = None
    config: str | None = None
    crop: str = "center"
    max_broken: float = 0.01
    skip_empty: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        split, subset = self.split, self.subset
        if self.heldout_subset and split == "heldout":
            split, subset = "all", self.heldout_subset
        elif self.heldout_subset and split == "train":
            split = "all"
        self.title = f"data set {self.name}, {subset}"
        rows = load_rows(self.name, self.config, subset)
        self.caption_column = find_caption_column(rows.column_names, self.caption_column, self.title)
        self._rows_print = rows._fingerprint  # private, and the only name datasets has for what rows hold
        self._images = as_encoded_images(rows, self.image_column, self.title)
        self._captions = rows.select_columns([self.caption_column])
        kept = self._rows_with_captions()
        self.numbers = [kept[i] for i in split_of(map(str, kept), split, self.heldout_fraction, self.title)]

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the data set's own fingerprint, the rows and columns taken, and how the images are cut."""
        parts = [self._rows_print, self.numbers, self.image_column, self.caption_column, self.resolution, self.crop]
        return f"hub-1/{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.numbers)

    def source(self, index: int) -> tuple[Path | bytes, str]:
        number = self.numbers[index]
        try:
            return image_cell(self._images[number][self.image_column]), f"row {number}"
        except (ValueError, OSError) as error:
            raise BrokenImageError(f"row {number} ({error})") from None

    def caption(self, index: int) -> str:
        """The caption alone, without decoding the image."""
        return self._text(self.numbers[index], self._captions[self.numbers[index]])

    def _text(self, number: int, row: dict) -> str:
        return caption_text(row[self.caption_column], f"{self.title}: column {self.caption_column!r} of row {number}")

    def _rows_with_captions(self) -> list[int]:
        kept = []
        for number, row in enumerate(self._captions):
            try:
                self._text(number, row)
            except ValueError as error:
                if not self.skip_empty:
                    raise ValueError(f"{error}, or leave such rows out with data.skip_empty=true") from None
            else:
                kept.append(number)
        return kept


def allowed_of(samples: int, max_broken: float) -> int:
    """How many of `samples` may be unusable: `max_broken`, or that share of them where it is below 1.

    A share of a small set would be none: ten may be in any case, unless they are more than half.
    """
    if not 0 < max_broken < 1:
        return int(max_broken)
    return max(int(max_broken * samples), min(ALWAYS_SKIPPED, samples // 2))


def check_split(split: str, heldout_fraction: float) -> None:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose from {', '.join(SPLITS)}")
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction={heldout_fraction} must lie in [0, 1)")


def split_of(names: Iterable[str], split: str, heldout_fraction: float, source: str) -> list[int]:
    """The indices of the names that belong to `split`; a name's place depends on the name and the fraction alone."""
    check_split(split, heldout_fraction)
    names = list(names)
    held_out = [is_held_out(name, heldout_fraction) for name in names]
    chosen = [i for i, held in enumerate(held_out) if split == "all" or held == (split == "heldout")]
    if not chosen:
        raise ValueError(
            f"the {split} split of {source} is empty: none of its {len(held_out)} pairs falls into it at "
            f"heldout_fraction={heldout_fraction}; {way_to_split(names)}"
        )
    return chosen


def way_to_split(names: list[str]) -> str:
    """The lowest fraction, in hundredths, that holds out enough for prompts and leaves others, or what else to do."""
    for percent in range(1, 100):
        held = sum(is_held_out(name, percent / 100) for name in names)
        if min(FEWEST_PROMPTS, len(names) // 2) <= held < len(names) and held:
            return f"data.heldout_fraction={percent / 100} holds out {held}"
    return "more images, or data.heldout_fraction=0 and data.prompt_file=FILE"


def is_held_out(name: str, fraction: float) -> bool:
    hashed = hashlib.sha256(name.encode(errors="surrogateescape"))  # names of files may be bytes that are no UTF-8
    return int.from_bytes(hashed.digest()[:8]) < fraction * 2**64


def load_rows(name: str, config: str | None, subset: str):
    """The rows of one split of a data set, from a folder made by `save_to_disk`, local files, or the hub."""
    import datasets  # late: a second of imports, and only this class needs it

    with loading(name, subset):
        if any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(name)
        else:
            saved = datasets.load_dataset(str(name), config, split=subset)
    if isinstance(saved, datasets.Dataset):
        return saved
    if subset not in saved:
        raise ValueError(f"data set {name} has no split {subset!r}; its splits are {', '.join(saved)}")
    return saved[subset]


@contextmanager
def loading(name: str, subset: str) -> Iterator[None]:
    """ValueError, in one line with a way out, for a data set that cannot be loaded."""
    import datasets

    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        way_out = "; copy it where there is a network (load_dataset(…).save_to_disk(DIR)) and set data.source=DIR"
        raise ValueError(
            f"data set {name}, split {subset!r}, cannot be loaded ({str(error).splitlines()[0].rstrip('.')})"
            f"{way_out if isinstance(error, ConnectionError) else ''}"
        ) from None


def image_cell(cell: dict | bytes | None) -> Path | bytes:
    """The encoded image in a cell of a table, or where it lies on disk; read, where that is a URL of fsspec's.

    Raises ValueError where there is none, OSError for a URL that cannot be read.
    """
    if isinstance(cell, dict):
        cell = cell["bytes"] or cell["path"]
    if not cell:
        raise ValueError("no image")
    if isinstance(cell, str):
        return read_whole(cell) if is_url(cell) else Path(cell)
    return cell


def as_encoded_images(rows, column: str, source: str):
    """The image column alone, as undecoded bytes or paths, so that a broken image is ours to name."""
    import datasets

    existing_column(rows.column_names, column, source, "data.image_column")
    feature = rows.features[column]
    if not isinstance(feature, datasets.Image) and getattr(feature, "dtype", None) not in ("binary", "string"):
        raise ValueError(f"column {column!r} of {source} holds no images but {feature}")
    return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
