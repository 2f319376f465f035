"""What does a training step on videos need? One step of an SVD-shaped network, and of an autoencoder what it codes.

    python benchmarks/video_step_memory.py [--out benchmarks/video-step-memory]

Every measurement is a process of its own, and what is read is the most that belonged to it alone (RssAnon, looked at
twenty times a second), less what did before. Of the training loop, with AdamW and an EMA, the first two steps are
looked at, each of one video of random latents; `counted` is what plan=true says of a step, in float32. The network has
Stable Video Diffusion's blocks at a tenth of its widths. The autoencoder is CogVideoX's at a quarter of its widths, which codes a video by diffusers'
own chunks of frames; tiles are a quarter of its picture.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLCogVideoX, UNetSpatioTemporalConditionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory_over_samples import MIB, Watch, status
from slimstep.engine.config import TrainConfig
from slimstep.engine.console import open_console
from slimstep.engine.environment import environment
from slimstep.engine.files import write_json, write_text
from slimstep.engine.loop import train
from slimstep.engine.run import Run
from slimstep.eval.memory_plan import MemoryNeed
from slimstep.eval.pages.tables import markdown_table
from slimstep.models.conditioning import Conditioning
from slimstep.models.decoding import decoded_images, encoded_images
from slimstep.models.denoiser import NUM_TOKENS
from slimstep.models.families.svd.network import PrunableUNetSpatioTemporalConditionModel
from slimstep.models.family import denoiser_of
from slimstep.models.memory import decoding_bytes, training_need
from slimstep.models.reference import SVD_XT

FRAMES, SIDE = 14, 32
VIDEO_FRAMES, VIDEO_SIDE = 17, 128
STEPS = ("plain", "stock checkpointing", "checkpointing")
CODINGS = ("encode", "encode in tiles", "decode", "decode in tiles")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/video-step-memory"))
    parser.add_argument("--steps", action="store_true", help="training steps alone, and no autoencoder")
    parser.add_argument("--work", choices=(*STEPS, *CODINGS), help="one measurement, in this process")
    options = parser.parse_args()
    if options.work:
        print(json.dumps(measured(options.work)))
        return
    works = STEPS if options.steps else (*STEPS, *CODINGS)
    rows = [measure(work) for work in works]
    write_json(options.out / "results.json", {
        "date": str(date.today()), "frames": FRAMES, "latents": SIDE, "rows": rows, "environment": environment(),
    })  # fmt: skip
    write_text(options.out / "table.md", table(rows))
    print(table(rows))


def measure(work: str) -> dict:
    """A measurement in a new process."""
    command = [sys.executable, __file__, "--work", work]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row = {"work": work, **json.loads(done.stdout.splitlines()[-1])}
    print(row, file=sys.stderr)
    return row


def measured(work: str) -> dict[str, float]:
    """The most MiB that a work took, and what is counted of it."""
    torch.set_num_threads(1)
    return of_step(work) if work in STEPS else of_coding(work)


def of_step(work: str) -> dict[str, float]:
    before = status("RssAnon")
    network = small_svd(UNetSpatioTemporalConditionModel if work.startswith("stock") else
                        PrunableUNetSpatioTemporalConditionModel)  # fmt: skip
    denoiser = denoiser_of(network)
    x_t, t_B, cond = denoiser.example(network, 2)
    videos = [{"latents": x, **{name: value[n] for name, value in cond.tensors.items()}} for n, x in enumerate(x_t)]

    peaks = []  # before each step: what follows the last one, as writing its weights, is no part of a step

    def denoise(unet: torch.nn.Module, batch: dict, generator: torch.Generator):
        peaks.append(watch.peak)
        given = Conditioning({name: batch[name] for name in cond.tensors})
        return denoiser(unet, batch["latents"], t_B[:1], given).square().mean(), {}

    config = TrainConfig(steps=3, batch_size=1, gradient_checkpointing=work != "plain", log_every=1)
    with tempfile.TemporaryDirectory() as folder, Watch() as watch:
        train(network, denoise, videos, config, Run(Path(folder) / "run", Accelerator(cpu=True)), "stage")
    taken = {"mib": peaks[-1] - before, "weights_mib": 4 * network.num_parameters() / MIB}
    if work.startswith("stock"):
        return taken
    need = MemoryNeed(
        parameters=network.num_parameters(), sample=partial(training_need, network, NUM_TOKENS), batch=1,
        optimizer=config.optimizer, has_ema=True, checkpointing=config.gradient_checkpointing, is_half=False,
    )  # fmt: skip
    return {**taken, "counted_mib": (need.total - need.parts["teacher"]) / MIB}  # there is none


def small_svd(kind: type) -> UNetSpatioTemporalConditionModel:
    torch.manual_seed(0)
    return kind(**{**SVD_XT, "sample_size": SIDE, "num_frames": FRAMES, "block_out_channels": (32, 64, 128, 128),
                   "num_attention_heads": (1, 2, 4, 4), "cross_attention_dim": 128})  # fmt: skip


def of_coding(work: str) -> dict[str, float]:
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(32, 64, 64, 128), down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, sample_height=VIDEO_SIDE, sample_width=VIDEO_SIDE,
    ).eval()  # fmt: skip
    is_tiled, side = work.endswith("tiles"), VIDEO_SIDE // 8
    if is_tiled:
        vae.enable_tiling()
    shape, before = (16, (VIDEO_FRAMES - 1) // 4 + 1, side, side), status("RssAnon")
    with torch.no_grad(), Watch() as watch:
        if work.startswith("encode"):
            encoded_images(vae, torch.rand(1, 3, VIDEO_FRAMES, VIDEO_SIDE, VIDEO_SIDE))
        else:
            decoded_images(vae, torch.randn(1, *shape))
    taken = {"mib": watch.peak - before}
    return taken if work.startswith("encode") else {**taken, "counted_mib": decoding_bytes(vae, shape, is_tiled) / MIB}


def table(rows: list[dict]) -> str:
    plain = {row["work"]: row["mib"] for row in rows}

    def line(row: dict) -> list[str]:
        first = row["work"].removesuffix(" in tiles") if row["work"] in CODINGS else "plain"
        counted = f"{row['counted_mib']:.0f}" if "counted_mib" in row else "–"
        name = row["work"] if row["work"] in CODINGS else f"a step, {row['work']}"
        return [name, f"{row['mib']:.0f}", f"{row['mib'] / plain[first]:.2f}", counted]

    return markdown_table(["work", "peak, MiB", "over the first of its kind", "counted, MiB"], [*map(line, rows)])


if __name__ == "__main__":
    open_console()
    main()
