"""Tars of samples, as the WebDataset convention has them: neighbouring files of one name are one sample.

    000123.jpg  000123.txt  000123.json     the key is the name up to its first dot

`datasets` reads such tars too, and ends at the first sample whose files are not those of the first five, or whose JSON
is damaged; here a broken sample is one broken sample, and a torn tar gives what it holds before the tear.
"""

import gzip
import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator
from functools import cached_property

from data.folder import IMAGE_SUFFIXES, few
from data.sources import expand, marks, open_at, unsigned
from data.streams import Entry, Stream
from data.tables import caption_column, caption_text

SUFFIXES = (".tar", ".tar.gz", ".tgz")
MOST_FILES = 100  # of one sample are read; more are many samples with a dot in what should be the key
TORN = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


class WebDatasetPairs(Stream):
    """The samples in the tars that `source` names: files, folders, globs, URLs, a list of these, braces written out.

    A caption is the sample's .txt file, or a text, caption or prompt in its .json; `caption_column` names another
    suffix or key. `image_column` names the image's suffix, which is found where a sample has one image.
    Raises ValueError for a source of nothing.
    """

    def __init__(
        self,
        source: str | list[str],
        resolution: int,
        split: str = "train",
        heldout_fraction: float = 0.1,
        image_column: str | None = None,
        caption_column: str | None = None,
        crop: str = "center",
        max_broken: float = 0.01,
    ) -> None:
        super().__init__(resolution, split, heldout_fraction, crop, max_broken)
        self.parts = expand(source, SUFFIXES)
        self.image_column, self.caption_column = image_column, caption_column

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any tar's name, size or time of change (what a server says of it), and with what is taken."""
        taken = [self.split, self.heldout_fraction, self.image_column, self.caption_column, self.resolution, self.crop]
        return f"webdataset-1/{hashlib.sha256(json.dumps([marks(self.parts), taken]).encode()).hexdigest()[:16]}"

    def read(self, part: int, start: int, images: bool = True) -> Iterator[Entry]:
        """Positions are bytes of the tar. What a torn tar has lost is one entry without a key, at the end."""
        tar_name = unsigned(self.parts[part]).rpartition("/")[2]
        position = start
        with open_at(self.parts[part], start) as file:
            try:
                for key, end, files in samples(file, start, images):
                    yield self._entry(key, f"{tar_name}: {key}", position, end, files)
                    position = end
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
        wanted = self.image_column and self.image_column.lower()
        found = [suffix for suffix in files if suffix == wanted or (wanted is None and is_image(suffix))]
        if len(found) != 1:
            asked = f" of the kind {wanted}" if wanted else ""
            hint = " (a key ends at its first dot)" if any("." in suffix for suffix in files) else ""
            raise ValueError(f"{'several images' if found else 'no image'}{asked} among {few(list(files))}{hint}")
        return found[0]

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


def samples(file, start: int, images: bool) -> Iterator[tuple[str, int, dict[str, bytes | None]]]:
    """(key, position of what follows, {suffix: content}) of every sample in a tar that is read from `start` on.

    The content of images is None where they are not asked for. Raises one of TORN where the tar ends too early.
    """
    tar = Tar.open(fileobj=file, mode="r:" if file.seekable() else "r|")
    before = 0 if file.seekable() else start  # a stream counts from where it was opened
    key, files = None, {}
    while member := tar.next():
        tar.members.clear()  # it would remember all
        if not member.isfile() or member.name.rpartition("/")[2].startswith("."):
            continue
        member_key, suffix = split_name(member.name)
        if key not in (None, member_key):
            yield key, before + member.offset, files
            files = {}
        key = member_key
        wanted = ("." not in suffix or len(files) < MOST_FILES) and (images or not is_image(suffix))
        files[suffix] = tar.extractfile(member).read() if wanted else None
    if key is not None:
        yield key, before + tar.offset, files
    if not tar.whole:
        raise tarfile.ReadError("it has no end mark")


def split_name(name: str) -> tuple[str, str]:
    """("folder/key", "suffix"), cut at the first dot of the file's own name: of KEY.seg.png it is seg.png."""
    folder, slash, own = name.rpartition("/")
    key, _, suffix = own.partition(".")
    return f"{folder}{slash}{key}", suffix.lower()


def is_image(suffix: str) -> bool:
    return f".{suffix}" in IMAGE_SUFFIXES
