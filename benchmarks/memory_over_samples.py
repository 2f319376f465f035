"""Does memory grow with the data set? Caching tars and training from the cache, at 1k, 10k and 100k tiny samples.

    python benchmarks/memory_over_samples.py [--samples 1000 10000 100000] [--out benchmarks/memory-over-samples]
    python benchmarks/memory_over_samples.py --videos [--samples 100 300 1000] [--out benchmarks/memory-over-videos]

Every measurement is a process of its own: tars of 16 px images are cached with a tiny random pipeline, then a UNet of
a few thousand weights trains on the cache for some hundred steps, which take samples from all over it. What is read is
the kernel's VmHWM, the most that lay in memory at once, and of it what belongs to the process alone (RssAnon at its
most, looked at twenty times a second) and not to mapped files, which the kernel takes back when it wants.

With --videos the tars hold mp4 files of nine frames of 64 px, 108 KiB each when they are decoded, and the pipeline is a
tiny random CogVideoX.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import av
import matplotlib.pyplot as plt
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.random_transformers import small_cogvideox_pipeline
from slimstep.data.cache import cache_pairs
from slimstep.data.shapes_video import ShapesVideoPairs
from slimstep.data.videos import WebDatasetVideos
from slimstep.data.webdataset import WebDatasetPairs
from slimstep.engine.config import TrainConfig
from slimstep.engine.console import open_console
from slimstep.engine.environment import environment
from slimstep.engine.files import write_json, write_text
from slimstep.engine.loop import train
from slimstep.engine.run import Run
from slimstep.eval.pages.tables import markdown_table
from tests.tiny import WIDTH, tiny_pipeline

SIDE, PER_TAR, SHARD, STEPS, BATCH = 16, 1000, 64, 300, 32
MIB = 2**20
FRAMES, VIDEO_SIDE, VIDEO_SHARD, VIDEO_STEPS, VIDEO_BATCH = 9, 64, 16, 100, 4
WORKS = ("cache", "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", action="store_true", help="tars of videos in the place of tars of images")
    parser.add_argument("--samples", type=int, nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", choices=WORKS, help="one measurement, in this process")
    parser.add_argument("--folder", type=Path, help="where it finds tars and cache")
    options = parser.parse_args()
    if options.work:
        print(json.dumps(measured(options.work, options.folder, options.videos)))
        return
    samples = options.samples or ([100, 300, 1000] if options.videos else [1000, 10_000, 100_000])
    options.out = options.out or Path("benchmarks", "memory-over-videos" if options.videos else "memory-over-samples")
    rows = [row for count in sorted(samples) for row in measure(count, options.videos)]
    steps, batch = (VIDEO_STEPS, VIDEO_BATCH) if options.videos else (STEPS, BATCH)
    record = {"date": str(date.today()), "steps": steps, "batch": batch, "rows": rows, "environment": environment()}
    write_json(options.out / "results.json", record)
    plot(rows, options.out / "curve.png")
    write_text(options.out / "table.md", table(rows))
    print(table(rows))


def measure(count: int, videos: bool) -> list[dict]:
    """Both works on `count` samples, each in a new process."""
    folder, rows = Path(tempfile.mkdtemp()), []
    try:
        write_tars(folder / "tars", count, *(("mp4", video) if videos else ("png", image)))
        for work in WORKS:
            command = [sys.executable, __file__, "--work", work, "--folder", str(folder)]
            command += ["--videos"] if videos else []
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append({"samples": count, "work": work, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], file=sys.stderr)
    finally:
        shutil.rmtree(folder)
    return rows


def write_tars(folder: Path, count: int, kind: str, made: Callable[[int], bytes]) -> None:
    """`count` samples with a caption each, `PER_TAR` a tar."""
    folder.mkdir()
    for first in range(0, count, PER_TAR):
        with tarfile.open(folder / f"part-{first // PER_TAR:05d}.tar", "w") as tar:
            for number in range(first, min(first + PER_TAR, count)):
                for suffix, content in ((kind, made(number)), ("txt", f"scene {number}".encode())):
                    member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def image(number: int) -> bytes:
    """Noise as a PNG."""
    file, draw = io.BytesIO(), np.random.default_rng(number)
    Image.fromarray(draw.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def video(number: int) -> bytes:
    """Moving shapes as an mp4."""
    pairs, file = ShapesVideoPairs(size=number + 1, resolution=VIDEO_SIDE, frames=FRAMES), io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = VIDEO_SIDE, VIDEO_SIDE, "yuv420p"
        for frame in pairs[number]["video"].numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def measured(work: str, folder: Path, videos: bool) -> dict[str, float]:
    """Seconds and the most memory that a work took, and what lay there before it began, in MiB."""
    torch.set_num_threads(1)
    pipeline, watch = small_cogvideox_pipeline() if videos else small_pipeline(), Watch()
    encode, train_some = (cache_videos, train_on_videos) if videos else (cache, train_on_images)
    before, began = status("RssAnon"), time.perf_counter()
    with watch:
        {"cache": encode, "train": train_some}[work](pipeline, folder)
    return {
        "peak_mib": status("VmHWM"),
        "own_peak_mib": watch.peak,
        "own_before_mib": before,
        "seconds": round(time.perf_counter() - began, 1),
    }


def small_pipeline():
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=WIDTH, attention_head_dim=2, sample_size=4,
    )  # fmt: skip
    return tiny_pipeline(vae_channels=(8, 8, 16), unet=unet)


def cache(pipeline, folder: Path):
    pairs = WebDatasetPairs(str(folder / "tars"), SIDE, "all")
    return cache_pairs(pairs, pipeline, folder / "cache", batch_size=64, shard_size=SHARD, dtype="float16")


def cache_videos(pipeline, folder: Path):
    pairs = WebDatasetVideos(str(folder / "tars"), VIDEO_SIDE, "all", frames=FRAMES)
    return cache_pairs(pairs, pipeline, folder / "cache", batch_size=2, shard_size=VIDEO_SHARD, dtype="float16")


def train_on_images(pipeline, folder: Path) -> None:
    def denoise(unet: nn.Module, batch: dict, generator: torch.Generator):
        noise = torch.randn(batch["latents"].shape, generator=generator)
        t_B = torch.randint(1000, (len(noise),), generator=generator)
        return (unet(batch["latents"] + noise, t_B, batch["text"]).sample - noise).square().mean(), {}

    train_network(pipeline.unet, denoise, cache(pipeline, folder), folder, STEPS, BATCH)


def train_on_videos(pipeline, folder: Path) -> None:
    def denoise(transformer: nn.Module, batch: dict, generator: torch.Generator):
        noise_BFCHW = torch.randn(batch["latents"].transpose(1, 2).shape, generator=generator)
        t_B = torch.randint(1000, (len(noise_BFCHW),), generator=generator)
        noisy_BFCHW = batch["latents"].transpose(1, 2) + noise_BFCHW
        return (transformer(noisy_BFCHW, batch["text"], t_B).sample - noise_BFCHW).square().mean(), {}

    pairs = cache_videos(pipeline, folder)
    train_network(pipeline.transformer, denoise, pairs, folder, VIDEO_STEPS, VIDEO_BATCH)


def train_network(network: nn.Module, objective, pairs, folder: Path, steps: int, batch: int) -> None:
    config = TrainConfig(steps=steps, batch_size=batch, log_every=50, checkpoint_every=10**6)
    train(network, objective, pairs, config, Run(folder / "run", Accelerator(cpu=True)), "stage")


class Watch:
    """The most of RssAnon while it is entered, in MiB."""

    def __enter__(self) -> "Watch":
        self.peak, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self.peak = max(self.peak, status("RssAnon"))


def status(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / MIB for line in lines if line.startswith(f"{key}:"))


def table(rows: list[dict]) -> str:
    header = ["samples", "work", "peak of the process's own memory, MiB", "before it", "peak with mapped files", "s"]
    return markdown_table(header, [
        [f"{row['samples']:,}", row["work"], *(f"{row[key]:.0f}" for key in
         ("own_peak_mib", "own_before_mib", "peak_mib", "seconds"))] for row in rows
    ])  # fmt: skip


def plot(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for work in WORKS:
        points = [row for row in rows if row["work"] == work]
        samples = [row["samples"] for row in points]
        (line,) = axes.plot(samples, [row["own_peak_mib"] for row in points], "o-", label=f"{work}: its own memory")
        axes.plot(samples, [row["peak_mib"] for row in points], "o--", color=line.get_color(),
                  label=f"{work}: with mapped files")  # fmt: skip
    axes.set(xscale="log", xlabel="samples", ylabel="peak, MiB", ylim=(0, None))
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    open_console()
    main()
