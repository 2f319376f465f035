"""Intact pixels are read whatever is written beside them; torn ones and bombs are not."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from slimstep.data.bare import bare
from slimstep.data.pixels import BrokenImageError, decode_rgb

PICTURE = Image.fromarray(np.random.default_rng(0).integers(256, size=(16, 24, 3), dtype=np.uint8))
MANY = zlib.compress(b"x" * 3_000_000)


def encoded(kind, image=PICTURE, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, content, damage=b""):
    checksum = damage or struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(*chunks, at_end=False):
    plain = encoded("PNG")
    place = plain.rindex(b"IEND") - 4 if at_end else 33  # 33: after the header
    return plain[:place] + b"".join(chunks) + plain[place:]


def segment(marker, content):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg(*segments):
    plain = encoded("JPEG")
    return plain[:2] + b"".join(segments) + plain[2:]


def tiff(*entries, then=0):
    """The tags of an EXIF block: (tag, type, count, value or offset)."""
    tags = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + struct.pack("<I", then)


TURNED = (0x112, 3, 1, 6)  # by 90° clockwise
ODD_EXIF = {
    "empty": b"", "header alone": b"II*\0", "no header": b"nonsense", "nowhere": b"II*\0\xff\xff\xff\x0f",
    "unknown orientation": tiff((0x112, 3, 1, 9)), "orientation as text": tiff((0x112, 2, 2, 54)),
    "big": b"II+\0\x08\0\0\0\x10\0", "torn": tiff((0x10F, 2, 4, 8))[:-10], "too many tags": b"II*\0\x08\0\0\0\xff\xff",
}  # fmt: skip
ODD_BUT_TURNED = {
    "unknown type": tiff(TURNED, (0x10F, 99, 4, 6)), "beyond the end": tiff(TURNED, (0x10F, 2, 100, 10**7)),
    "numbers as text": tiff(TURNED, (0x100, 2, 4, 0x636261)), "64 bits": tiff(TURNED, (0x101, 16, 1, 10)),
    "ring of tables": tiff(TURNED, then=8), "table at a negative place": tiff(TURNED, (0x8769, 9, 1, 2**32 - 5)),
    "count without end": tiff(TURNED, (0x10F, 2, 2**32 - 1, 8)), "maker's note": tiff(TURNED, (0x927C, 7, 100, 20)),
}  # fmt: skip
BESIDE_PNG = {
    "zTXt": chunk(b"zTXt", b"k\0\0" + MANY), "iTXt": chunk(b"iTXt", b"k\0\1\0\0\0" + MANY),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + MANY),
    "tEXt": 12 * chunk(b"tEXt", b"k\0" + 6_000_000 * b"x"),
    "iCCP": chunk(b"iCCP", b"k\0\0" + MANY), "iCCP, empty": chunk(b"iCCP", b""), "zTXt, odd": chunk(b"zTXt", b"k\0\7x"),
    "eXIf": chunk(b"eXIf", b"nonsense"), "pHYs": chunk(b"pHYs", b"x"), "gAMA": chunk(b"gAMA", b"x"),
    "acTL": chunk(b"acTL", b"x"), "checksum": chunk(b"tEXt", b"k\0v", damage=b"\0\0\0\0"), "vpAg": chunk(b"vpAg", b""),
    "raw EXIF": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n   5\nzzzz"),
}  # fmt: skip
BESIDE_JPEG = {
    "ICC, short": segment(0xE2, b"ICC_PROFILE\0"), "ICC, part 2 of 5": segment(0xE2, b"ICC_PROFILE\0\2\5abc"),
    "pictures, odd": segment(0xE2, b"MPF\0nonsense"),
    "pictures, none": segment(0xE2, b"MPF\0" + tiff((0xB001, 4, 1, 0))),
    "Adobe, short": segment(0xEE, b"Adobe"), "JFIF, short": segment(0xE0, b"JFIF"),
    "comment": segment(0xFE, b"\xff" * 9),
    "Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\xff\xff\xff\xff"),
    "XMP": segment(0xE1, b"http\0\xff"),
    "EXIF twice": segment(0xE1, b"Exif\0\0" + ODD_EXIF["torn"]) + segment(0xE1, b"Exif\0\0nonsense"),
}  # fmt: skip


def equal(one, other):
    return one.size == other.size and np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("at_end", [False, True], ids=["before the pixels", "after them"])
@pytest.mark.parametrize("name", BESIDE_PNG)
def test_what_stands_beside_the_pixels_of_a_png_changes_nothing(name, at_end):
    assert equal(decode_rgb(png(BESIDE_PNG[name], at_end=at_end), "x"), PICTURE)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BESIDE_JPEG)
def test_what_stands_beside_the_pixels_of_a_jpeg_changes_nothing(name):
    assert equal(decode_rgb(jpeg(BESIDE_JPEG[name]), "x"), decode_rgb(jpeg(), "x"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [*ODD_EXIF, *ODD_BUT_TURNED])
def test_an_orientation_that_can_be_read_counts_and_other_exif_is_passed_over(name):
    exif = (ODD_EXIF | ODD_BUT_TURNED)[name]
    files = {
        "JPEG": (jpeg(segment(0xE1, b"Exif\0\0" + exif)), jpeg()),
        "PNG": (png(chunk(b"eXIf", exif)), png()),
        "WebP": (encoded("WEBP", lossless=True, exif=exif), encoded("WEBP", lossless=True)),
    }
    for odd, plain in files.values():
        expected = decode_rgb(plain, "x")
        if name in ODD_BUT_TURNED:
            expected = expected.transpose(Image.Transpose.ROTATE_270)
        assert equal(decode_rgb(odd, "x"), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_undoes_how_the_camera_was_held_beside_a_large_text_too(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    for image in (encoded("PNG", exif=exif), encoded("JPEG", quality=95, exif=exif)):
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
        assert equal(decode_rgb(image, "x"), expected) and equal(decode_rgb(bare(image), "x"), expected)
    text = png(chunk(b"eXIf", tiff((0x112, 3, 1, orientation))), BESIDE_PNG["zTXt"])
    assert equal(decode_rgb(text, "x"), decode_rgb(encoded("PNG", exif=exif), "x"))


def test_a_picture_of_several_and_colours_for_print_are_read():
    other = PICTURE.transpose(Image.Transpose.ROTATE_180)
    several = encoded("MPO", save_all=True, append_images=[other])
    assert equal(decode_rgb(several, "x"), decode_rgb(encoded("JPEG"), "x"))
    print_colours = encoded("JPEG", PICTURE.convert("CMYK"))
    assert equal(decode_rgb(bare(print_colours), "x"), decode_rgb(print_colours, "x"))  # APP14 says how they are stored


@pytest.mark.parametrize("beside", [b"", BESIDE_PNG["zTXt"]], ids=["alone", "beside a large text"])
def test_too_many_pixels_are_refused_and_torn_ones_named(monkeypatch, beside):
    torn = png(beside)[:-60]
    with pytest.raises(BrokenImageError, match=r"^x \(.+\)$"):
        decode_rgb(torn, "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 16 // 2 - 1)
    with pytest.raises(BrokenImageError, match=r"x \((Image size|Decompressed data)"):
        decode_rgb(png(beside), "x")


def test_a_text_that_is_a_bomb_is_not_unpacked(monkeypatch):
    bomb = png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"\0" * 50_000_000)))
    unpacked, real = [], zlib.decompressobj

    class Watched:
        def __init__(self):
            self.inner = real()

        def decompress(self, data, most):
            unpacked.append(len(out := self.inner.decompress(data, most)))
            return out

        @property
        def unconsumed_tail(self):
            return self.inner.unconsumed_tail

    monkeypatch.setattr(zlib, "decompressobj", Watched)
    assert equal(decode_rgb(bomb, "x"), PICTURE)
    assert unpacked and max(unpacked) <= 1 << 20
