"""One file in Stable Diffusion's original layout, as web UIs read it, from a diffusers folder; and the other way round.

    slimstep convert runs/distill_steps/steps-8/export student.safetensors --dtype float16
    slimstep convert model.safetensors DIR          # also .ckpt, with --allow-pickle

SD-1.x, SD-2.x and SDXL; a hub id serves as a folder. What is there is replaced with --force only.
"""

import argparse
from pathlib import Path

from slimstep.engine.launch import fail, set_up
from slimstep.engine.quiet import one_line

DTYPES = ("float32", "float16", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a single file, a diffusers folder or a hub id")
    parser.add_argument("target", type=Path, help="a .safetensors file for a folder, a folder for a file")
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of the source's UNet")
    parser.add_argument("--variant", help="infix of the folder's weight files, as fp16: those read, or those written")
    parser.add_argument("--config", help="for a file: what model.single_file_config is for a model")
    parser.add_argument("--vae", help="another autoencoder: what model.vae is for a model")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin, .ckpt and .pt files too")
    parser.add_argument("--force", action="store_true", help="replace a target that exists")
    options = parser.parse_args()
    set_up()
    from slimstep.engine.execution import quiet_libraries  # here, since --help and a misspelt option need none of this
    from slimstep.models.convert import convert

    quiet_libraries()
    try:
        convert(**vars(options))
    except (ValueError, OSError) as error:
        fail(one_line(error))
