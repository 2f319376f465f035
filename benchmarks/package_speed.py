"""How soon is a guided UNet's first image there, and how fast are the next: eager, compiled, and from packages?

    python train.py +experiment=package model.name_or_path=assets/shapes name=package package.steps=[8]
    python benchmarks/package_speed.py --model assets/shapes --packages runs/package

Each row is new processes on one thread, --rounds of each in turn. The clock starts when the libraries are loaded; it
covers reading the files, compiling where there is any, the first evaluation, and the whole first image. Steady
evaluations of the denoiser are timed in one process, in turn, by CPU time. Compiling starts with an empty cache
(compiled), or with that of the process before (compiled, cache kept). A row's files are read once before its process
starts, so that all are in the page cache: how fast a disk is, or what a row before has left of it, is not measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from slimstep.eval.packaging import run_package

EAGER, COMPILED, KEPT = "eager", "compiled", "compiled, cache kept"
ROWS = (EAGER, COMPILED, KEPT, "onnx", "aoti")
PROMPT = "a red circle above a blue square"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("assets/shapes"), help="the pipeline's folder")
    parser.add_argument("--packages", type=Path, help="the run of +experiment=package, with onnx/ and aoti/")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="later evaluations and images in each process")
    parser.add_argument("--only", nargs="*", default=ROWS, choices=ROWS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steady", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/package-speed"), help="where the results go")
    options = parser.parse_args()
    if options.child == "inputs":
        write_inputs(options)
        print("{}")
    elif options.child:
        print(json.dumps(cold(options.child, options)))
    elif options.steady:
        print(json.dumps(steady(options)))
    else:
        measure(options)


# ---- a process of its own ----


def called(row: str, options: argparse.Namespace) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """One evaluation of the denoiser at the package's own inputs, and one whole image; what they need is loaded."""
    manifest = run_package.read_manifest(options.packages / ("aoti" if row == "aoti" else "onnx"))
    inputs = dict(np.load(options.inputs))
    if row in ("onnx", "aoti"):
        package = run_package.Package(options.packages / row, manifest)
        request = run_package.asked([PROMPT])
        return lambda: package.call("denoise", inputs), lambda: package.draw(request)
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(options.model, torch_dtype=torch.float32, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    if row != EAGER:
        pipeline.unet.compile(dynamic=False)
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    sample, timestep = given.pop("sample"), given.pop("timestep")

    def evaluation() -> Any:
        with torch.no_grad():
            return pipeline.unet(sample, timestep.expand(len(sample)), **given, return_dict=False)[0]

    call = {"num_inference_steps": manifest["steps"], "guidance_scale": manifest["guidance_scale"]}
    return evaluation, lambda: pipeline(PROMPT, **call)


def write_inputs(options: argparse.Namespace) -> None:
    """What the denoiser is given for one image, the same for every row: by a process of its own, whose memory goes."""
    manifest = run_package.read_manifest(options.packages / "onnx")
    rows = 2 if manifest["guides"] else 1
    text = run_package.Package(options.packages / "onnx", manifest).encode(PROMPT)
    noise = np.random.default_rng(0).standard_normal((rows, *manifest["latents"]), np.float32)
    inputs = {"sample": noise, "timestep": np.array([500.0], np.float32)}
    np.savez(options.inputs, **inputs, **{name: np.repeat(row, rows, axis=0) for name, row in text.items()})


def cold(row: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds from loaded libraries to the end of the first evaluation and of the first image, and those of others."""
    load_libraries(row)
    start = time.perf_counter()
    evaluation, image = called(row, options)
    loaded = time.perf_counter()
    evaluation()
    evaluated = time.perf_counter()
    image()
    drawn = time.perf_counter()
    again = [seconds(evaluation) for _ in range(options.repeats)]
    images = [seconds(image) for _ in range(options.repeats)]
    return {
        "load_s": loaded - start, "first_evaluation_s": evaluated - start, "first_image_s": drawn - start,
        "evaluation_s": statistics.median(again), "image_s": statistics.median(images), "peak_bytes": peak_bytes(),
    }  # fmt: skip


def load_libraries(row: str) -> None:
    if row == "onnx":
        import onnxruntime  # noqa: F401
        import tokenizers  # noqa: F401

        return
    if row == "aoti":
        run_package.compile_no_probe()
    import torch._inductor.package  # noqa: F401

    if row != "aoti":
        from diffusers import StableDiffusionPipeline  # noqa: F401


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def seconds(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    function()
    return clock() - start


def steady(options: argparse.Namespace) -> dict[str, list[float]]:
    """CPU seconds of an evaluation by each row, interleaved A B C … C B A."""
    rows = [row for row in options.only if row != KEPT]
    evaluations = {row: called(row, options)[0] for row in rows}
    for evaluation in evaluations.values():
        evaluation()
    times: dict[str, list[float]] = {row: [] for row in rows}
    for k in range(4 * options.rounds):
        for row in rows if k % 2 else reversed(rows):
            times[row].append(seconds(evaluations[row], time.process_time))
    return times


# ---- all of them ----


def measure(options: argparse.Namespace) -> None:
    from slimstep.engine.environment import environment
    from slimstep.engine.files import write_json, write_text
    from slimstep.eval.pages.tables import Table

    found: dict[str, list[dict[str, float]]] = {row: [] for row in options.only}
    with tempfile.TemporaryDirectory() as place:
        options.inputs = Path(place) / "inputs.npz"
        times = measured(options, found)
    base = COMPILED if COMPILED in times else options.only[0]
    against = {row: [b / a for a, b in zip(times[row], times[base], strict=True)] for row in times}
    middle = lambda row, key: statistics.median(one[key] for one in found[row])  # noqa: E731
    cost = {row: [one["first_evaluation_s"] - one["evaluation_s"] for one in ones] for row, ones in found.items()}
    sooner = {row: [a / b for a, b in zip(cost[base], cost[row], strict=True)] for row in cost if base in cost}
    table = Table.of({
        "way": lambda row: row,
        "first evaluation": lambda row: f"{middle(row, 'first_evaluation_s'):.2f} s",
        "sooner than compiling": lambda row: spread(sooner[row]) if row in sooner else "–",
        "first image": lambda row: f"{middle(row, 'first_image_s'):.2f} s",
        f"evaluations a second over {base}": lambda row: spread(against[row]) if row in against else "–",
        "peak memory": lambda row: f"{middle(row, 'peak_bytes') / 1e6:.0f} MB",
    }, options.only)  # fmt: skip
    write_text(options.out / "table.md", table.markdown)
    manifest = {"model": options.model.name, "rounds": options.rounds, "environment": environment()}
    write_json(options.out / "table.json", {**manifest, "cold": found, "cpu_s": times})
    print(table.console)


def measured(options: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> dict[str, list[float]]:
    """Fills in what each row's processes took; the CPU seconds of steady evaluations."""
    with tempfile.TemporaryDirectory() as unused:
        child(options, unused, "--child", "inputs")
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for row in options.only:
                with tempfile.TemporaryDirectory() as unused:
                    keeps = cache if row in (COMPILED, KEPT) else unused
                    read_once(options.packages / row if row in ("onnx", "aoti") else options.model)
                    found[row].append(child(options, keeps, "--child", row))
    with tempfile.TemporaryDirectory() as unused:
        return child(options, unused, "--steady")


def read_once(folder: Path) -> None:
    for file in (file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass


def child(options: argparse.Namespace, cache: str, *words: str) -> dict[str, Any]:
    own = ["--model", str(options.model), "--packages", str(options.packages), "--rounds", str(options.rounds)]
    own += ["--inputs", str(options.inputs), "--repeats", str(options.repeats)]
    command = [sys.executable, __file__, *own, *words, *(["--only", *options.only] if "--steady" in words else [])]
    kept = {"TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **kept}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{words}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(ratios: list[float]) -> str:
    """The median, and the quartiles of a ratio within a round."""
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}×"
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")  # exclusive ones of two lie outside them
    return f"{statistics.median(ratios):.3g}× [{low:.3g}, {high:.3g}]"


if __name__ == "__main__":
    main()
