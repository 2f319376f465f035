"""A pipeline with random weights, and pruned and narrow students: for speed, and for trying jobs without weights.

    python scripts/random_pipeline.py sd15 runs/random/sd15      # also sd21, sdxl: of their sizes, in half precision
    python scripts/random_pipeline.py flux runs/random/flux      # a small one of a transformer's family, in float32
    python scripts/random_pipeline.py svd runs/random/svd        # a small Stable Video Diffusion, in float32

Writes DIR/teacher; DIR/pruned, without the blocks that BK-SDM's base and small networks lack, of a transformer without
every second block but the first and the last, of Stable Video Diffusion without every second block in time; DIR/narrow,
whose VAE decoder has half its channels, where its class is one that can be pruned. What is there stays.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimstep.engine.console import open_console
from slimstep.engine.launch import fail
from slimstep.engine.quiet import one_line

TRANSFORMERS = ("sd3", "sd35", "pixart_alpha", "pixart_sigma", "flux", "flux_guided", "sana", "qwen_image")


SMALL = (*TRANSFORMERS, "svd")


def small_pipelines() -> dict[str, Callable]:
    """{name: makes the pipeline}, of every family of transformers, and of Stable Video Diffusion."""
    from diffusers import PixArtAlphaPipeline

    from scripts import random_transformers as small
    from scripts.random_svd import small_svd_pipeline

    sd35 = {"num_layers": 5, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
    makers = (
        small.small_sd3_pipeline,
        lambda: small.small_sd3_pipeline(small.small_sd3(**sd35)),
        lambda: small.small_pixart_pipeline(PixArtAlphaPipeline),
        small.small_pixart_pipeline,
        small.small_flux_pipeline,
        lambda: small.small_flux_pipeline(guidance_embeds=True),
        small.small_sana_pipeline,
        small.small_qwen_image_pipeline,
    )
    return dict(zip(SMALL, (*makers, small_svd_pipeline), strict=True))


def make_small(name: str, folder: Path) -> dict[str, str]:
    """{teacher, pruned, narrow: folder} of a small random model; no narrow one where its VAE cannot be pruned."""
    from diffusers import AutoencoderKL

    from slimstep.models.networks import network_of
    from slimstep.models.pipeline import export_pipeline, load_pipeline, quiet, with_unet
    from slimstep.prune.decoder import choose_channels, pruned_vae, pruned_widths

    if not (folder / "teacher/model_index.json").exists():
        with quiet():
            small_pipelines()[name]().save_pretrained(folder / "teacher")
    pipeline = load_pipeline(folder / "teacher")
    network = network_of(pipeline)
    in_time = [block for block in network.kept_blocks if ".temporal_" in block]
    with quiet():
        pruned = network.with_architecture(dict.fromkeys(in_time[::2] or network.kept_blocks[1:-1:2], 0))
    students = {"pruned": with_unet(pipeline, pruned)}
    if isinstance(pipeline.vae, AutoencoderKL):
        widths = pruned_widths(pipeline.vae, 0.5)
        narrow = pruned_vae(pipeline.vae, choose_channels(pipeline.vae, widths, "first"), widths)
        students["narrow"] = with_unet(pipeline, network, vae=narrow)
    for member, made in students.items():
        if not (folder / member / "model_index.json").exists():
            with quiet():
                export_pipeline(made, folder / member)
    return {member: str(folder / member) for member in ("teacher", *students)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"{', '.join(SMALL)}, or shapes: the bundled model, which is not random"
    parser.add_argument("size", help=f"sd15, sd21, sd21_base, sdxl, {names}")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        if options.size in SMALL:
            family = make_small(options.size, options.folder)
        else:
            from slimstep.prune.family import make_family  # here, since --help needs none of it

            family = make_family(options.size, options.folder)
    except (ValueError, OSError) as error:
        fail(one_line(error))
    for name, folder in family.items():
        print(name, folder)


if __name__ == "__main__":
    open_console()
    main()
