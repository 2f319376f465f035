"""Tars of samples, as the WebDataset convention has them: neighbouring files of one name are one sample.

    000123.jpg  000123.txt  000123.json     the key is the name up to its first dot

`datasets` reads such tars too, and ends at the first sample whose files are not those of the first five, or whose JSON
is damaged; here a broken sample is one broken sample, and a torn tar gives what it holds before the tear.

As with the package webdataset, a suffix that comes twice in a sample is a mistake (whose caption is whose?), and files
without a suffix belong to no sample. Keys need to differ within a tar only: where several of the first tars begin with
the same key, the tar's name goes before every key, so that a share of such samples can be held out.
"""

import gzip
import hashlib
import json
import logging
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import PurePosixPath
from typing import ClassVar

from slimstep.data.folder import IMAGE_SUFFIXES, few
from slimstep.data.sources import ASKED_AT_ONCE, expand, marks, open_at, unsigned
from slimstep.data.streams import Entry, Stream
from slimstep.data.tables import caption_column, caption_text

OF_TARS = (".tar", ".tar.gz", ".tgz")
MOST_FILES = 100  # of one sample are read; more are many samples with a dot in what should be the key
TORN = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)
PEEKED = 8  # tars are asked for their first key
log = logging.getLogger("slimstep")


class WebDatasetPairs(Stream):
    """The samples in the tars that `source` names: files, folders, globs, URLs, a list of these, braces written out.

    A caption is the sample's .txt file, or a text, caption or prompt in its .json; `caption_column` names another
    suffix or key. `image_column` names the image's suffix, which is found where a sample has one image.
    Raises ValueError for a source of nothing.
    """

    KIND: ClassVar[str] = "image"
    SUFFIXES: ClassVar[tuple[str, ...]] = IMAGE_SUFFIXES

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parts = expand(self.source, OF_TARS)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any tar's name, size or time of change (what a server says of it), and with what is taken."""
        facts = [marks(self.parts), self.taken, *(["tars' names in keys"] if self.prefixes[0] else [])]
        return f"webdataset-1/{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"

    @cached_property
    def prefixes(self) -> list[str]:
        """What goes before the keys of every tar: nothing, or its name where several of the first begin with one key.

        Tars of one name, in several folders, may hold the same images with other captions: they count as one.
        """
        names, first_tars = ends(self.parts), {}
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            for name, key in zip(names, pool.map(first_key, self.parts[:PEEKED] if names[1:] else ()), strict=False):
                if key is None or (other := first_tars.setdefault(key, name)) == name:
                    continue
                if self.split != "heldout":
                    note = "tars' names count, too, in which samples are held out"
                    log.info("%s and %s begin with the same key, %s: %s", other, name, key, note)
                return [f"{name}/" for name in names]
        return [""] * len(names)

    def read(self, part: int, start: int, images: bool = True) -> Iterator[Entry]:
        """Positions are bytes of the tar. What a torn tar has lost is one entry without a key, at the end.

        Samples of one name are an entry each, at the bytes from their first header on, which is a block long.
        """
        tar_name, prefix = unsigned(self.parts[part]).rpartition("/")[2], self.prefixes[part]
        passed = start % tarfile.BLOCKSIZE
        position = start - passed
        with open_at(self.parts[part], position) as file:
            try:
                for key, end, files, counts in samples(file, position, images, self.is_image):
                    name = f"{tar_name}: {key}"
                    if flaw := repeated(counts):
                        times = max((n for suffix, n in counts.items() if self.is_image(suffix)), default=1)
                        steps = range(position + passed, position + min(times, tarfile.BLOCKSIZE))
                        for at in steps:
                            yield Entry(f"{prefix}{key}", name, at, end if at == steps[-1] else at + 1, flaw=flaw)
                    else:
                        yield self._entry(f"{prefix}{key}", name, position, end, files)
                    position, passed = end, 0
            except TORN as error:
                flaw = f"torn at byte {position}: {str(error).splitlines()[0] if str(error) else 'it ends early'}"
                yield Entry(None, tar_name, position, position, flaw=flaw)

    def _entry(self, key: str, name: str, start: int, end: int, files: dict[str, bytes | None]) -> Entry:
        try:
            image = files[self._image_of(files)]
            return Entry(key, name, start, end, image, self._caption_of(files))
        except (ValueError, RecursionError) as error:
            return Entry(key, name, start, end, flaw=str(error))

    def _image_of(self, files: dict[str, bytes | None]) -> str:
        target = self.image_column and self.image_column.lower()
        matches = [suffix for suffix in files if suffix == target or (target is None and self.is_image(suffix))]
        if len(matches) != 1:
            of_kind = f" of the kind {target}" if target else ""
            hint = " (a key ends at its first dot)" if any("." in suffix for suffix in files) else ""
            number = f"several {self.KIND}s" if matches else f"no {self.KIND}"
            raise ValueError(f"{number}{of_kind} among {few(list(files))}{hint}")
        return matches[0]

    def is_image(self, suffix: str) -> bool:
        return f".{suffix}" in self.SUFFIXES

    def _caption_of(self, files: dict[str, bytes]) -> str:
        suffix = (self.caption_column or "txt").lower()
        if suffix in files:
            return caption_text(files[suffix].decode("utf-8-sig"), f".{suffix}")
        if "json" not in files:
            raise ValueError(f"no caption .{suffix} or .json among {few(list(files))}")
        row = json.loads(files["json"])
        if not isinstance(row, dict):
            raise ValueError(".json is no object")
        column = caption_column(row, self.caption_column, ".json")
        return caption_text(row[column], f".json, {column}")


class Header(tarfile.TarInfo):
    """Notes in its tar whether the end mark was met: tarfile takes a torn header for the end."""

    @classmethod
    def fromtarfile(cls, tar: "Tar") -> "Header":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            tar.whole = True
            raise


class Tar(tarfile.TarFile):
    tarinfo, whole = Header, False


def samples(
    file, start: int, images: bool, is_image: Callable[[str], bool]
) -> Iterator[tuple[str, int, dict[str, bytes | None], Counter[str]]]:
    """(key, position of what follows, {suffix: content}, how often each suffix came) of every sample in a tar that is
    read from `start` on.

    The content of images is None where they are not asked for. Raises one of TORN where the tar ends too early.
    """
    tar = Tar.open(fileobj=file, mode="r:" if file.seekable() else "r|")
    before = 0 if file.seekable() else start  # a stream counts from where it was opened
    key, files, counts = None, {}, Counter()
    while member := tar.next():
        tar.members.clear()  # it would remember all
        if not belongs(member):
            continue
        member_key, suffix = split_name(member.name)
        if key not in (None, member_key):
            yield key, before + member.offset, files, counts
            files, counts = {}, Counter()
        key = member_key
        counts[suffix] += 1
        is_read = ("." not in suffix or len(files) < MOST_FILES) and (images or not is_image(suffix))
        files[suffix] = tar.extractfile(member).read() if is_read and counts[suffix] == 1 else None
    if key is not None:
        yield key, before + tar.offset, files, counts
    if not tar.whole:
        raise tarfile.ReadError("it has no end mark")


def belongs(member: tarfile.TarInfo) -> bool:
    """Whether a member is a file of a sample."""
    leaf = member.name.rpartition("/")[2]
    return member.isfile() and "." in leaf and not leaf.startswith(".")


def repeated(counts: Counter[str]) -> str:
    """What is wrong with a sample in which a suffix came twice; empty where none did."""
    twice = {suffix: times for suffix, times in counts.items() if times > 1}
    summary = " and ".join(f"{suffix} {times} times" for suffix, times in list(twice.items())[:3])
    return f"{summary} under this one name: neighbouring samples need names that differ" if twice else ""


def first_key(tar: str) -> str | None:
    """The key of the first sample in a tar; None where there is none before the tar ends or is torn."""
    with open_at(tar, 0) as file:
        try:
            reading = Tar.open(fileobj=file, mode="r:" if file.seekable() else "r|")
            while member := reading.next():
                if belongs(member):
                    return split_name(member.name)[0]
        except TORN:
            pass
    return None


def ends(paths: Sequence[str]) -> list[str]:
    """The paths' own names, with those of their folders before them where all names are alike."""
    parts = [PurePosixPath(unsigned(path)).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(ending[-length:]) for ending in parts]
        if len(set(names)) > 1:
            break
    return names


def split_name(name: str) -> tuple[str, str]:
    """("folder/key", "suffix"), cut at the first dot of the file's own name: of KEY.seg.png it is seg.png."""
    folder, slash, leaf = name.rpartition("/")
    key, _, suffix = leaf.partition(".")
    return f"{folder}{slash}{key}", suffix.lower()
