"""What does a training step on videos need? Of an SVD-shaped network, with and without gradient checkpointing.

    python benchmarks/video_step_memory.py [--out benchmarks/video-step-memory]

Every measurement is a process of its own, and what is read is the most that belonged to it alone (RssAnon, looked at
twenty times a second), less what did before. Of the training loop, with AdamW and an EMA, the first two steps are
looked at, each of one video of random latents; `counted` is what plan=true says of a step, in float32. The network has
Stable Video Diffusion's blocks at a tenth of its widths.
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
from diffusers import UNetSpatioTemporalConditionModel

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
from slimstep.models.denoiser import NUM_TOKENS
from slimstep.models.families.svd.network import PrunableUNetSpatioTemporalConditionModel
from slimstep.models.family import denoiser_of
from slimstep.models.memory import training_need
from slimstep.models.reference import SVD_XT

FRAMES, SIDE = 14, 32
STEPS = ("plain", "stock checkpointing", "checkpointing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/video-step-memory"))
    parser.add_argument("--work", choices=STEPS, help="one measurement, in this process")
    options = parser.parse_args()
    if options.work:
        print(json.dumps(measured(options.work)))
        return
    rows = [measure(work) for work in STEPS]
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
    """The most MiB that two steps took, and what is counted of one."""
    torch.set_num_threads(1)
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


def table(rows: list[dict]) -> str:
    lines = [[row["work"], f"{row['mib']:.0f}", f"{row['mib'] / rows[0]['mib']:.2f}",
              f"{row['counted_mib']:.0f}" if "counted_mib" in row else "–"] for row in rows]  # fmt: skip
    return markdown_table(["a step", "peak, MiB", "over the plain one", "counted, MiB"], lines)


if __name__ == "__main__":
    open_console()
    main()
