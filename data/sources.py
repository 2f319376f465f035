"""Files that a stream is read from: names with braces and globs, on disk, behind a URL, or in a store fsspec knows.

A name is a path, an http(s) URL, or another URL that fsspec opens (s3://, gs://, hf://, with its own package).
"""

import glob
import gzip
import http.client
import io
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import fsspec

TIMEOUT_S, TRIES, BUFFER_BYTES, ASKED_AT_ONCE = 60, 4, 1 << 20, 16
OF_A_URL = "%/:=&?~#+!$,;'@()*[]"  # what is not to be quoted in it
NOTHING_LEFT = 416  # to a request for what begins at the end
TOO_MANY = 429
UNTOLD = (403, 405, 501)  # what servers say that hand files out and answer no HEAD, as behind signed URLs


def expand(source: str | Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    """The files that `source` names, in their order: braces {000..127} and {a,b} are written out, a glob or a folder
    gives what it holds by name. Raises ValueError for a name of nothing."""
    patterns = [source] if isinstance(source, str) else source
    names = [name for pattern in patterns for plain in unbrace(pattern) for name in _found(plain, suffixes)]
    if not names:
        raise ValueError(f"data.source={source} names no file")
    return list(dict.fromkeys(names))  # globs may overlap


def _found(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    if is_url(pattern) or Path(pattern).is_file():
        return [pattern]
    matches = Path(pattern).rglob("*") if Path(pattern).is_dir() else map(Path, glob.glob(pattern, recursive=True))
    files = (path for path in matches if path.is_file() and path.name[0] != ".")
    if names := sorted(str(path) for path in files if path.name.endswith(suffixes)):
        return names
    raise ValueError(f"data.source: {pattern} names no file; a glob or a folder is searched for {', '.join(suffixes)}")


def unbrace(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for, as a shell writes them out; {000..127} keeps its zeros."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    before, inside, after = pattern[: match.start()], match[1], pattern[match.end() :]
    if ends := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = ends.groups()
        width = len(first) if first.startswith("0") else 0
        words = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
        if not words:
            raise ValueError(f"data.source: {{{inside}}} counts to nothing; the first number is the lower one")
    else:
        words = inside.split(",")
    return [name for word in words for name in unbrace(f"{before}{word}{after}")]


def is_url(name: str) -> bool:
    return "://" in name


def is_http(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def marks(names: Sequence[str]) -> list[list]:
    """What tells a file from another of its name, without reading it: size and time of change, or what its server
    says. Raises ValueError for a URL of nothing."""
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return list(pool.map(_mark, names))


def _mark(name: str) -> list:
    if is_http(name):
        return [unsigned(name), *_listed_by_server(name)]
    if is_url(name):
        with opening(name):
            filesystem, path = fsspec.core.url_to_fs(name)
            return [name, filesystem.ukey(path)]
    stat = Path(name).stat()
    return [Path(name).name, stat.st_size, stat.st_mtime_ns]


def unsigned(url: str) -> str:
    """Without what may be a signature, which is nobody else's to see and another each time."""
    return url.partition("?")[0]


def _listed_by_server(url: str) -> list[str | None]:
    for tried in range(TRIES):
        wait_before(tried)
        try:
            with ask(url, method="HEAD") as answer:
                return [answer.headers["ETag"], answer.headers["Last-Modified"], answer.headers["Content-Length"]]
        except urllib.error.HTTPError as error:
            if error.code in UNTOLD:
                return []
            reason = f"HTTP {error.code} {error.reason}"
            if is_lasting(error):
                break
        except (OSError, http.client.HTTPException) as error:
            reason = error
    raise ValueError(f"data.source: {unsigned(url)} cannot be had ({reason})")


def ask(url: str, **request) -> http.client.HTTPResponse:
    """A server's answer; letters that a URL should not have are quoted."""
    quoted = urllib.parse.quote(url, safe=OF_A_URL)
    return urllib.request.urlopen(urllib.request.Request(quoted, **request), timeout=TIMEOUT_S)


def wait_before(tried: int) -> None:
    """A while before another try, longer after each; none before the first."""
    if tried:
        time.sleep(2**tried / 4)


def is_lasting(error: Exception) -> bool:
    """Whether a server's answer will be the same when it is asked again."""
    return 400 <= getattr(error, "code", 500) < 500 and error.code != TOO_MANY


@contextmanager
def opening(name: str) -> Iterator[None]:
    """ValueError for what is not there, and for a scheme that fsspec, or the package it wants for it, serves not."""
    try:
        yield
    except (ImportError, ValueError, FileNotFoundError) as error:
        raise ValueError(f"data.source: {name} cannot be opened ({error})") from None


def read_whole(url: str) -> bytes:
    """What lies behind the URL of one image among many. Raises OSError, ValueError."""
    with io.BufferedReader(HttpImage(url, 0)) if is_http(url) else _opened(url, 0) as file:
        return file.read()


def open_at(name: str, start: int) -> BinaryIO:
    """The file from byte `start` on; of a .gz or .tgz, from that byte of its content. Raises OSError, ValueError."""
    if name.partition("?")[0].endswith("gz"):
        file = gzip.GzipFile(fileobj=_opened(name, 0))
        file.seek(start)
        return file
    return _opened(name, start)


def _opened(name: str, start: int) -> BinaryIO:
    if is_http(name):
        return io.BufferedReader(HttpFile(name, start), BUFFER_BYTES)
    if is_url(name):
        with opening(name):
            file = fsspec.open(name, "rb").open()
    else:
        file = open(name, "rb")  # noqa: SIM115  the caller closes it
    file.seek(start)
    return file


class HttpFile(io.RawIOBase):
    """The bytes of a URL from `start` on, read forward; where a connection breaks, it is asked for the rest.

    Raises OSError after a few tries in vain: what was cached stays, and the same command goes on.
    """

    tries, way_out = TRIES, "; the same command goes on where it stopped"

    def __init__(self, url: str, start: int) -> None:
        self.url, self.position, self._answer, self._end = url, start, None, None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        for tried in range(self.tries):
            wait_before(tried)
            try:
                if self._answer is None:
                    self._ask()
                count = self._answer.readinto(buffer)
                if count or self._end is None or self.position >= self._end:
                    self.position += count
                    return count
                reason = f"the connection ended at byte {self.position} of {self._end}"
            except (OSError, http.client.HTTPException) as error:
                if getattr(error, "code", None) == NOTHING_LEFT:
                    return 0
                if is_lasting(error):
                    raise OSError(f"{unsigned(self.url)} cannot be read ({error})") from None
                reason = error
            self._answer = None
        raise OSError(f"{unsigned(self.url)} cannot be read ({reason}){self.way_out}")

    def close(self) -> None:
        if self._answer is not None:
            self._answer.close()
        super().close()

    def _ask(self) -> None:
        rest = {"Range": f"bytes={self.position}-"} if self.position else {}
        self._answer = ask(self.url, headers=rest)
        length = self._answer.headers["Content-Length"]
        if self._answer.status == 206 or not self.position:
            self._end = self.position + int(length) if length else None
            return
        self._end = int(length) if length else None  # a server without ranges sends it all
        left = self.position
        while left and (skipped := len(self._answer.read(min(left, BUFFER_BYTES)))):
            left -= skipped


class HttpImage(HttpFile):
    """The same for one image of a table, whose links are dead here and there: asked twice, and then it is broken."""

    tries, way_out = 2, ""
