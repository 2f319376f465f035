"""A small folder of real captioned photographs, cut from those that scikit-image's wheel brings along: no download.

    python scripts/make_photo_folder.py --root photos
    accelerate launch train.py +experiment=prune_unet data=imagefolder data.root=photos model=shapes \\
        scorer=shapes scorer.force=true  # which knows drawn shapes alone

Every view below is a square of one photograph and what can be seen in it. Each becomes several images: jittered crops,
mirrored ones (left and right exchanged in the caption too), a dim, a blurry and, of colour photographs, a black and
white one. Captions are short, because the bundled model's tokenizer, made for other data, has to spell these words.
The same command makes the same folder: images/*.jpg and metadata.jsonl, the layout of imagefolder.
"""

import argparse
import importlib.util
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimstep.engine.console import open_console
from slimstep.engine.files import write_text


@dataclass(frozen=True)
class View:
    """Squares (left, top, side) in pixels of a photograph, all showing what `caption` says."""

    photo: str
    caption: str
    squares: tuple[tuple[int, int, int], ...]
    mirrored: bool = True


def view(photo: str, caption: str, *squares: tuple[int, int, int]) -> View:
    return View(photo, caption, squares, mirrored=photo not in ("page.png", "text.png"))  # nobody writes mirrored


ASTRONAUT, CAMERA, CAT, COFFEE = "astronaut.png", "camera.png", "chelsea.png", "coffee.png"
MOTORCYCLE, ROCKET, COINS, MOON = "motorcycle_left.png", "rocket.jpg", "coins.png", "moon.png"
TISSUE, EYE, SKY, PAGE = "ihc.png", "retina.jpg", "hubble_deep_field.jpg", "page.png"
VIEWS = (
    view(ASTRONAUT, "an astronaut with a flag on the left", (0, 0, 512)),
    view(ASTRONAUT, "the face of a smiling woman", (110, 0, 210)),
    view(ASTRONAUT, "a helmet with a dark visor", (290, 330, 182)),
    view(ASTRONAUT, "a model of a space shuttle", (300, 20, 212)),
    view(ASTRONAUT, "a round blue patch on orange cloth", (105, 325, 130)),
    view(ASTRONAUT, "part of a blue flag with stars", (0, 15, 100)),
    view(CAMERA, "a man with a camera in a field", (0, 0, 512)),
    view(CAMERA, "a man looks into a camera", (150, 50, 190)),
    view(CAMERA, "the legs of a tripod on grass", (215, 290, 222)),
    view(CAMERA, "a tall building far away", (365, 95, 147)),
    view(CAMERA, "a lawn of short grass", (400, 260, 110), (395, 380, 115)),
    view(CAT, "the face of a tabby cat", (100, 0, 300)),
    view(CAT, "the left half of the face of a tabby cat", (60, 30, 190)),
    view(CAT, "the right half of the face of a tabby cat", (215, 60, 190)),
    view(CAT, "the green eye of a cat", (120, 65, 105), (275, 95, 90)),
    view(CAT, "the nose of a cat", (205, 190, 110)),
    view(CAT, "the whiskers of a tabby cat", (30, 160, 140)),
    view(COFFEE, "a cup of coffee on a red saucer", (80, 0, 400)),
    view(COFFEE, "a cup of coffee from above", (165, 5, 260)),
    view(COFFEE, "the left part of a cup and a red saucer", (60, 60, 250)),
    view(COFFEE, "the right part of a red saucer, a spoon", (290, 140, 220)),
    view(COFFEE, "a shiny spoon on a red saucer", (305, 215, 120)),
    view(COFFEE, "the coffee in a white cup", (195, 60, 170)),
    view(COFFEE, "the edge of a red saucer on wood", (0, 200, 200)),
    view(COFFEE, "the wood of a table", (450, 0, 150), (490, 180, 110)),
    view(MOTORCYCLE, "a red motorcycle in a garage", (130, 0, 500), (220, 0, 500)),
    view(MOTORCYCLE, "the front wheel of a motorcycle", (505, 265, 195)),
    view(MOTORCYCLE, "the rear wheel of a motorcycle", (110, 230, 180)),
    view(MOTORCYCLE, "the engine of a motorcycle", (320, 230, 180)),
    view(MOTORCYCLE, "the headlight of a motorcycle", (470, 75, 150)),
    view(MOTORCYCLE, "boxes on shelves in a garage", (520, 0, 130)),
    view(MOTORCYCLE, "the seat and the tank of a red motorcycle", (190, 110, 220)),
    view(ROCKET, "a rocket between two lattice masts", (110, 0, 427)),
    view(ROCKET, "the top of a rocket in a dark sky", (240, 90, 180)),
    view(ROCKET, "a rocket right of a lattice mast", (155, 130, 215)),
    view(ROCKET, "a rocket left of a lattice mast", (285, 130, 215)),
    view(ROCKET, "a lattice tower in the evening", (0, 20, 180), (490, 20, 150)),
    view(ROCKET, "bright lights in the evening", (60, 290, 137)),
    view(COINS, "rows of old coins", (0, 0, 303), (81, 0, 303)),
    view(COINS, "several old coins", (0, 0, 150), (110, 80, 150), (40, 150, 150)),
    view(COINS, "one old coin", (300, 8, 74), (309, 150, 75), (13, 228, 68)),
    view(MOON, "the surface of the moon", (0, 0, 512), (0, 250, 250)),
    view(MOON, "a round crater on the moon", (60, 30, 130)),
    view(MOON, "a dark crater on the moon", (285, 75, 120)),
    view(TISSUE, "tissue under a microscope", (0, 0, 512), (50, 180, 250)),
    view(TISSUE, "a round brown gland among blue cells", (235, 295, 215)),
    view(EYE, "the retina of an eye", (0, 0, 1411)),
    view(EYE, "the bright optic disc of a retina", (80, 480, 340)),
    view(EYE, "the dark spot in the middle of a retina", (500, 500, 400)),
    view(EYE, "the blood vessels of a retina", (280, 120, 480)),
    view(SKY, "distant galaxies in a black sky", (0, 0, 872), (100, 100, 350), (500, 400, 350)),
    view(PAGE, "a printed page", (0, 0, 191), (100, 0, 191)),
    view("text.png", "handwritten letters on paper", (0, 0, 172), (140, 0, 172), (270, 0, 172)),
    view("brick.png", "rows of bricks", (0, 0, 300), (200, 150, 250)),
    view("grass.png", "grass and leaves from above", (0, 0, 250), (200, 200, 250)),
    view("gravel.png", "gravel", (0, 0, 200), (250, 250, 200)),
    view("cell.png", "a bright cell under a microscope", (280, 220, 260)),
)


def mirror(caption: str) -> str:
    """Left for right and right for left, as in a mirrored image."""
    exchange = {"left": "right", "right": "left"}
    return re.sub(r"\b(left|right)\b", lambda word: exchange[word[0]], caption)


def without_colours(caption: str) -> str:
    """What is still to be seen in black and white."""
    return re.sub(r"\b(red|orange|green|blue|brown) ", "", caption)


def images_of(view: View, photo: Image.Image, size: int) -> Iterator[tuple[str, Image.Image]]:
    """(caption, image) of every crop, mirror image and treatment of a view."""
    grey = photo.mode == "L"
    kind = "black and white, " if grey else ""
    dice = random.Random(f"{view.photo} {view.caption}")

    def crop() -> Image.Image:
        left, top, side = view.squares[dice.randrange(len(view.squares))]
        inner = round(side * dice.uniform(0.92, 1))
        left, top = left + dice.randint(0, side - inner), top + dice.randint(0, side - inner)
        box = (left, top, left + inner, top + inner)
        return photo.convert("RGB").resize((size, size), Image.Resampling.LANCZOS, box=box)

    for _ in range(2):
        yield f"{kind}{view.caption}", crop()
    yield f"dim, {kind}{view.caption}", ImageEnhance.Brightness(crop()).enhance(0.4)
    yield f"blurry, {kind}{view.caption}", crop().filter(ImageFilter.GaussianBlur(size / 64))
    if view.mirrored:
        yield f"{kind}{mirror(view.caption)}", ImageOps.mirror(crop())
    if not grey:
        yield f"black and white, {without_colours(view.caption)}", ImageOps.grayscale(crop())


def make_photo_folder(root: Path, size: int) -> int:
    """Writes the folder unless it is there in full, and returns its number of images."""
    metadata = root / "metadata.jsonl"
    if metadata.is_file():
        return len(metadata.read_text().splitlines())
    if root.exists() and any(root.iterdir()):
        raise SystemExit(f"error: {root} is not empty and holds no metadata.jsonl; choose another folder")
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise SystemExit("error: the photographs come with scikit-image, which is missing: pip install scikit-image")
    source = Path(package.origin).parent / "data"
    (root / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for view in VIEWS:
        photo = Image.open(source / view.photo)
        for caption, image in images_of(view, photo, size):
            name = f"images/{Path(view.photo).stem}-{len(rows):03d}.jpg"
            image.save(root / name, quality=95)
            rows.append(json.dumps({"file_name": name, "text": caption}))
    write_text(metadata, "\n".join(rows) + "\n")  # last: it says that the folder is complete
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder to make")
    parser.add_argument("--size", type=int, default=128, help="side of the square images in pixels (default 128)")
    arguments = parser.parse_args()
    if arguments.size < 1:
        parser.error(f"--size {arguments.size} must be at least 1")
    number = make_photo_folder(arguments.root, arguments.size)
    print(f"{number} captioned images in {arguments.root}")


if __name__ == "__main__":
    open_console()
    main()
