"""Small tars of captioned noise, for tests of streams."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from slimstep.engine.seeding import seed_of


def picture(key: str, kind: str = "png", size: tuple[int, int] = (24, 16)) -> bytes:
    """Noise that depends on the key, encoded."""
    pixels = np.random.default_rng(seed_of(key)).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    """A tar of these files, of pairs where names come twice; .gz in its name has it compressed."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sound(keys: list[str]) -> dict[str, bytes]:
    """{name: content} of a picture and a caption for every key."""
    return {
        name: content
        for key in keys
        for name, content in ((f"{key}.png", picture(key)), (f"{key}.txt", f"caption of {key}".encode()))
    }


def write_tars(folder: Path, tars: int = 3, samples: int = 10) -> list[str]:
    """part-000.tar and so on; sample i of tar t is called t-i. Their paths."""
    names = [[f"{t}-{i:03d}" for i in range(samples)] for t in range(tars)]
    return [str(write_tar(folder / f"part-{t:03d}.tar", sound(keys))) for t, keys in enumerate(names)]


def captioned(text: str) -> bytes:
    return json.dumps({"text": text, "blip": f"blip {text}"}).encode()
