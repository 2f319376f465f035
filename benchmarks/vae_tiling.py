"""How far are images that an autoencoder codes in tiles from others? The bundled one, on pictures larger than a tile.

    python benchmarks/vae_tiling.py

Writes benchmarks/vae-tiling/results.json: for pictures of several sides in pixels, of which a tile has 64, the PSNR of
the decoded picture to the untiled one from the same latents, that of both to the real picture, and the root mean square
error of tiled latents in standard deviations of the untiled ones. A picture is a mosaic of held-out scenes, each as
large as the model's own images, or one scene drawn larger.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimstep.data.shapes import ShapesPairs
from slimstep.engine.console import open_console
from slimstep.engine.environment import environment
from slimstep.engine.files import write_json
from slimstep.eval.metrics.clip import psnr
from slimstep.eval.metrics.compare import mean_and_error
from slimstep.eval.sampling import eight_bits
from slimstep.models.decoding import decoded_images, encoded_images

ROOT, TILE = Path(__file__).resolve().parents[1], 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16, help="pictures of each kind and size")
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256], help=f"multiples of {TILE} px")
    options = parser.parse_args()
    if bad := [side for side in options.sides if side < TILE or side % TILE]:
        parser.error(f"--sides {bad}: multiples of {TILE}, the side of a tile")
    vae = AutoencoderKL.from_pretrained(ROOT / "assets/shapes/vae").eval().requires_grad_(False)
    kinds = {"mosaic of scenes": mosaic, "one large scene": large_scene}
    rows = [
        {"pictures": kind, "side": side, **compared(vae, torch.stack([make(i, side) for i in range(options.count)]))}
        for side in options.sides for kind, make in kinds.items()
    ]  # fmt: skip
    record = {"tile": TILE, "count": options.count, "rows": rows, "environment": environment()}
    write_json(ROOT / "benchmarks/vae-tiling/results.json", record)
    for row in rows:
        print(row)


def mosaic(number: int, side: int) -> Tensor:
    """uint8 [3, H, W]: neighbouring scenes of a tile's size."""
    pairs, across = ShapesPairs("heldout", resolution=TILE), side // TILE
    scenes = [pairs[number * across**2 + k]["image"] for k in range(across**2)]
    return torch.cat([torch.cat(scenes[k : k + across], dim=2) for k in range(0, len(scenes), across)], dim=1)


def large_scene(number: int, side: int) -> Tensor:
    return ShapesPairs("heldout", resolution=side)[number]["image"]


@torch.no_grad()
def compared(vae: AutoencoderKL, images_P3HW: Tensor) -> dict:
    """Mean and standard error over the pictures, each coded by itself."""
    x_P3HW = images_P3HW.float() / 127.5 - 1
    latents, images = {}, {}
    for name in ("whole", "tiled"):
        (vae.enable_tiling if name == "tiled" else vae.disable_tiling)()
        latents[name] = torch.cat([encoded_images(vae, x[None]) for x in x_P3HW])
        images[name] = torch.cat([eight_bits(decoded_images(vae, z[None])) for z in latents["whole"]])
    error = (latents["tiled"] - latents["whole"]).square().mean((1, 2, 3)).sqrt() / latents["whole"].std()
    values = {
        "decoded tiled to decoded whole, dB": psnr(images["tiled"], images["whole"]),
        "decoded whole to the picture, dB": psnr(images["whole"], images_P3HW),
        "decoded tiled to the picture, dB": psnr(images["tiled"], images_P3HW),
        "error of tiled latents, deviations": error,
    }
    return {name: vars(mean_and_error(value.tolist())) for name, value in values.items()}


if __name__ == "__main__":
    open_console()
    main()
