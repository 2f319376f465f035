"""How much faster is the decoder of Stable Diffusion at half its width? Random weights, interleaved.

    python benchmarks/decoder_speed.py                                         # CPU: 64×64 latents, one image, eager
    python benchmarks/decoder_speed.py --sizes 64 128 --batches 1 4 --dtype float16 --compile    # a GPU

Writes benchmarks/decoder-speed/DEVICE.json: both decoders' milliseconds, the ratio with its quartiles, and the share of
the ratio of floating point operations that has become time. On a CPU milliseconds are one thread's CPU time.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimstep.engine.console import open_console
from slimstep.engine.environment import environment
from slimstep.engine.files import write_json
from slimstep.eval.config import LatencyConfig
from slimstep.eval.decoders import compare_decoders
from slimstep.eval.pages.vae_page import time_table
from slimstep.models.reference import VAE_CONFIGS, random_vae
from slimstep.prune.decoder import choose_channels, pruned_vae, pruned_widths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", choices=VAE_CONFIGS, default="sd15")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64], help="latent heights and widths")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=240, help="at most, for each row of the table")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/decoder-speed"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = random_vae(options.vae)
    widths = pruned_widths(teacher, options.width)
    student = pruned_vae(teacher, choose_channels(teacher, widths, "first"), widths)
    config = LatencyConfig(
        batch=1, compile=options.compile, dtype=options.dtype, warmup=2, iterations=options.iterations,
        seconds=options.seconds,
    )  # fmt: skip
    rows = compare_decoders({"teacher": teacher, "student": student}, options.sizes, options.batches, config, device)
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name() if device.type == "cuda" else "cpu").lower()
    record = {"vae": options.vae, "widths": widths, "dtype": options.dtype, "rows": rows, "environment": environment()}
    write_json(options.out / f"{name}.json", record)
    print(time_table(rows).markdown)


if __name__ == "__main__":
    open_console()
    main()
