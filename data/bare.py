"""PNG and JPEG files without their metadata: intact pixels are to be read whatever is written beside them.

Decoders give up on a large text, a profile or a tag that they cannot read. Nothing is decompressed here beyond
`PngImagePlugin.MAX_TEXT_CHUNK`, and pixels are copied as they are: a bomb stays a bomb, a torn file stays torn.
"""

import struct
import zlib
from collections.abc import Iterator

from PIL import PngImagePlugin

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
PIXELS_NEED = (b"tRNS", b"eXIf")  # of the chunks that a decoder may pass over: transparency, and which side is up
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
OF_ORIENTATION = (b"XML:com.adobe.xmp", b"Raw profile type exif")
APP0, APP14, COMMENT, SCAN = 0xE0, 0xEE, 0xFE, 0xDA
ADOBE_BYTES = 12  # of a whole APP14: it says how the colours are stored


def bare(image: bytes) -> bytes | None:
    """The same PNG or JPEG with what its pixels and its orientation need alone; None for another kind of file."""
    if image.startswith(PNG):
        return PNG + b"".join(raw for kind, body, raw in png_chunks(image) if png_needs(kind, body))
    if image.startswith(JPEG):
        return JPEG + b"".join(raw for marker, body, raw in jpeg_segments(image) if jpeg_needs(marker, body))
    return None


def png_chunks(image: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """(type, content, the whole chunk) of every chunk; the last may be torn."""
    start = len(PNG)
    while start < len(image):
        (length,) = struct.unpack(">I", image[start : start + 4].rjust(4, b"\0"))
        end = start + 12 + length
        yield image[start + 4 : start + 8], image[start + 8 : end - 4], image[start:end]
        start = end


def png_needs(kind: bytes, body: bytes) -> bool:
    """A capital letter marks the chunks that no decoder may pass over (PNG specification, 5.4)."""
    if kind in TEXTS:
        return body.partition(b"\0")[0] in OF_ORIENTATION and is_small(kind, body)
    return kind in PIXELS_NEED or kind[:1].isupper() or not kind


def is_small(kind: bytes, body: bytes) -> bool:
    """Whether a text is no larger than decoders read, decompressed, and can be decompressed at all."""
    text = body.partition(b"\0")[2]
    if kind == b"tEXt" or (kind == b"iTXt" and text[:1] == b"\0"):
        return len(text) <= PngImagePlugin.MAX_TEXT_CHUNK
    packed = text[1:] if kind == b"zTXt" else text[2:].split(b"\0", 2)[-1]
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK)
    except zlib.error:
        return False
    return not unpacking.unconsumed_tail


def jpeg_segments(image: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(marker, content, the whole segment) up to the first scan, which is all that is left; as they stand."""
    start = len(JPEG)
    while start < len(image):
        at = start
        while image[at : at + 1] == b"\xff":  # a marker may be preceded by any number of these
            at += 1
        marker = image[at] if start < at < len(image) else SCAN  # what is no marker is left as it is
        if marker == SCAN:
            yield SCAN, b"", image[start:]
            return
        end = at + 1 + int.from_bytes(image[at + 1 : at + 3])
        yield marker, image[at + 3 : end], image[start : max(end, at + 3)]
        start = max(end, at + 3)


def jpeg_needs(marker: int, body: bytes) -> bool:
    """Of applications' segments and comments the colours' and the orientation's alone."""
    if marker == APP14:
        return len(body) >= ADOBE_BYTES
    if APP0 <= marker <= 0xEF:
        return body.startswith(b"Exif\0\0")
    return marker != COMMENT
