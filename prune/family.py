"""A pipeline of a known size with random weights, and its pruned and narrow students."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

from slimstep import ROOT
from slimstep.models.known import random_pipeline
from slimstep.models.pipeline import export_pipeline, load_pipeline, quiet, with_unet
from slimstep.prune.decoder import choose_channels, pruned_vae, pruned_widths

LAST = "mid_block.resnets.1"  # BK-SDM small ends with the mid block


def make_family(size: str, folder: Path) -> dict[str, str]:
    """{teacher, pruned, narrow: folder}, made where it is not there yet; size shapes is the bundled model, not random.

    Raises ValueError for an unknown size.
    """
    folders = {name: folder / name for name in ("teacher", "pruned", "narrow")}
    named = {name: str(place) for name, place in folders.items()}
    if all((place / "model_index.json").exists() for place in folders.values()):
        return named
    pipeline = load_pipeline(ROOT / "assets/shapes") if size == "shapes" else random_pipeline(size, torch.float16)
    unet = pipeline.unet
    order = list(OmegaConf.load(ROOT / "configs/search/bk_sdm.yaml").method.blocks)
    blocks = [block for block in order[: order.index(LAST) + 1] if block in unet.kept_blocks]
    pruned = unet.with_architecture(dict.fromkeys(blocks, 0))
    widths = pruned_widths(pipeline.vae, 0.5)
    narrow = pruned_vae(pipeline.vae, choose_channels(pipeline.vae, widths, "first"), widths)
    narrow_pipeline = with_unet(pipeline, unet, vae=narrow)
    family = {"teacher": pipeline, "pruned": with_unet(pipeline, pruned), "narrow": narrow_pipeline}
    with quiet():
        for name, member in family.items():
            export_pipeline(member.to(dtype=torch.float16), folders[name])
    return named
