#!/usr/bin/env bash
# Library: Pillow 13.0.0.
#
# A JPEG with a colour profile of more than 1 MiB is opened, made smaller and saved as PNG. Profiles with lookup
# tables, of printers and scanners, have this size.
#
# A good guess: the PNG can be opened again.
#
# What really happens: Pillow carries the profile over to the PNG without being asked, and cannot read its own file:
# `Image.open` raises ValueError "Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK". The limit of 1 MiB
# is documented for text, and holds for the profile too. A save as JPEG or WebP drops the profile, and TIFF keeps it
# and can be read.
#
# Whom it concerns: everybody who prepares photographs as PNG. Intact images are dropped by loaders that skip what they
# cannot open, and stop those that do not.
#
# What to do instead: convert to sRGB with ImageCms and save with `icc_profile=None`. To read such files, set
# `PIL.PngImagePlugin.MAX_TEXT_CHUNK` higher.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0

cat > "$tmp/finding.py" <<'PYTHON'
import io
import random
import struct

import PIL
from PIL import Image, ImageCms, PngImagePlugin

print("Pillow", PIL.__version__)


def profile(size):
    """sRGB with a private tag of `size` bytes, which stands for lookup tables."""
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    count = struct.unpack(">I", plain[128:132])[0]
    tags = [struct.unpack(">4sII", plain[132 + 12 * i : 144 + 12 * i]) for i in range(count)]
    body = plain[132 + 12 * count :]
    body += bytes(-len(body) % 4)
    tags = [(name, offset + 12, length) for name, offset, length in tags]
    tags.append((b"priv", 132 + 12 * (count + 1) + len(body), size))
    table = b"".join(struct.pack(">4sII", *tag) for tag in tags)
    data = b"data" + bytes(4) + random.Random(0).randbytes(size - 8)
    whole = plain[:128] + struct.pack(">I", count + 1) + table + body + data
    return struct.pack(">I", len(whole)) + whole[4:]


def photo(size):
    file = io.BytesIO()
    image = Image.linear_gradient("L").convert("RGB")
    image.save(file, "JPEG", icc_profile=profile(size))
    return Image.open(file)


def written(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def read(file):
    file.seek(0)
    image = Image.open(file)
    image.load()
    return image


def outcome(file):
    try:
        image = read(file)
    except ValueError as error:
        return f"ValueError: {error}"
    return f"read, profile of {len(image.info.get('icc_profile', b''))} bytes"


SIZE = 1_200_000
small = photo(SIZE).resize((64, 64))
held = ImageCms.ImageCmsProfile(io.BytesIO(small.info["icc_profile"]))
ImageCms.profileToProfile(small, held, ImageCms.createProfile("sRGB"))
print("LittleCMS accepts the profile of", len(small.info["icc_profile"]), "bytes.")

found = {kind: outcome(written(small, kind)) for kind in ("PNG", "TIFF", "WEBP", "JPEG")}
found["PNG, profile of 0.9 MB"] = outcome(written(photo(900_000).resize((64, 64)), "PNG"))
found["PNG, icc_profile=None"] = outcome(written(small, "PNG", icc_profile=None))
file = written(small, "PNG")
PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20
found["PNG, higher limit"] = outcome(file)
for name, text in found.items():
    print(f"{name}: {text}")

assert found["PNG"] == "ValueError: Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK"
assert all(text.startswith("read") for name, text in found.items() if name != "PNG")
print("Pillow wrote a PNG that it cannot read.")
PYTHON
"$tmp/venv/bin/python" "$tmp/finding.py"
