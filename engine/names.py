"""Names of files and folders that are made of what a user wrote, which may be longer than a file system takes."""

import hashlib

LONGEST = 255  # bytes of a name, on nearly all file systems
CUT = 200  # bytes of a name that was too long: endings are added to some
DIGITS = 16


def disk_name(text: str, longest: int = LONGEST) -> str:
    """`text` as one name on disk; of a longer one the beginning, and a hash of all of it."""
    name = text.replace("/", "_")
    if len(name.encode()) <= longest:
        return name
    digits = hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
    beginning = name.encode()[: min(longest, CUT) - DIGITS - 1].decode(errors="ignore")
    return f"{beginning}-{digits}"


def check_name(text: str, key: str, longest: int = LONGEST) -> None:
    """ValueError for what names no folder, or folders that a file system does not take."""
    parts = text.split("/")
    if not text or text.startswith("/") or ".." in parts:
        raise ValueError(f"{key}={text!r} must name a folder, and none outside the run")
    if long := [part for part in parts if len(part.encode()) > longest]:
        message = f"a name of {len(long[0].encode())} bytes, and at most {longest} can be a folder's"
        raise ValueError(f"{key}={text[:60]}… is {message}: shorten it")
