"""A pipeline of a known size with random weights, and its pruned and narrow kin: for speed, where weights are not.

    python scripts/random_pipeline.py sd15 runs/random/sd15      # also sd21, sdxl

Writes DIR/teacher; DIR/pruned, without the blocks that BK-SDM's base and small networks lack; DIR/narrow, whose VAE
decoder has half its channels. Half precision, what is there stays.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import OmegaConf

from models.known import KNOWN, random_pipeline
from models.pipeline import export_pipeline, load_pipeline, quiet, with_unet
from prune.decoder import choose_channels, narrow_widths, narrowed

ROOT = Path(__file__).resolve().parents[1]
LAST = "mid_block.resnets.1"  # BK-SDM small ends with the mid block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=(*KNOWN, "shapes"), help="shapes is the shipped model, which is not random")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    for name, folder in make_family(options.size, options.folder).items():
        print(name, folder)


def make_family(size: str, folder: Path) -> dict[str, str]:
    """{teacher, pruned, narrow: folder}, made where it is not there yet."""
    folders = {name: folder / name for name in ("teacher", "pruned", "narrow")}
    if all((place / "verdict.json").exists() for place in folders.values()):
        return {name: str(place) for name, place in folders.items()}
    pipeline = load_pipeline(ROOT / "assets/shapes") if size == "shapes" else random_pipeline(size, torch.float16)
    unet = pipeline.unet
    order = list(OmegaConf.load(ROOT / "configs/search/bk_sdm.yaml").method.sites)
    sites = [site for site in order[: order.index(LAST) + 1] if site in unet.kept_sites]
    pruned = unet.with_depths(dict.fromkeys(sites, 0))
    widths = narrow_widths(pipeline.vae, 0.5)
    narrow = narrowed(pipeline.vae, choose_channels(pipeline.vae, widths, "first"), widths)
    narrow_pipeline = with_unet(pipeline, unet, vae=narrow)
    family = {"teacher": pipeline, "pruned": with_unet(pipeline, pruned), "narrow": narrow_pipeline}
    with quiet():
        for name, member in family.items():
            export_pipeline(member.to(dtype=torch.float16), folders[name])
    return {name: str(place) for name, place in folders.items()}


if __name__ == "__main__":
    main()
