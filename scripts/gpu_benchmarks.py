"""All measurements that want a GPU, in one command that can be stopped and started again.

    python scripts/gpu_benchmarks.py                                # SD-1.5's networks, random weights
    python scripts/gpu_benchmarks.py --minutes 600                  # in one go
    python scripts/gpu_benchmarks.py --size sdxl --parts cumulative pipelines
    python scripts/gpu_benchmarks.py --size shapes --quick          # the bundled model: a CPU can try the script

Every part is a job or script of this project, run in the order below; its numbers are OUT/<part>.json. A part that is
there is not run again. After `--minutes` the running part is stopped, and the same command goes on within it.
"""

import argparse
import glob
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimstep.engine.console import open_console
from slimstep.engine.files import write_json
from slimstep.engine.renamed import EXPERIMENTS

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 20  # for a stopped part to leave
Part = tuple[str, list[str], str]  # name, command, a pattern of where its JSON is afterwards
QUICK_ROWS = [
    "benchmark.rows=[{name: vanilla, attention: vanilla}, {name: TF32, dtype: tf32}, "
    "{name: 2 steps, model: few_steps, steps: 2}, {name: pruned UNet, model: pruned}, "
    "{name: narrow decoder, vae: narrow}, {name: captured, capture: true}]"
]


def main() -> int:
    """Returns 0 when all is measured, 75 when the time was up, 1 when a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("sd15", "sdxl", "shapes"), default="sd15")
    named = lambda part: EXPERIMENTS.get(part, part)  # noqa: E731  as earlier versions called them
    parser.add_argument("--parts", nargs="+", metavar="PART", type=named, help="some of them (default: all)")
    parser.add_argument("--minutes", type=float, default=9.5, help="of this call (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few rows and calls: to try the script, not to measure")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu"), help="models and unfinished work")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu"), help="results")
    options = parser.parse_args()
    from slimstep.engine.environment import environment  # here, since --help needs none of this
    from slimstep.prune.family import make_family

    end = time.monotonic() + 60 * options.minutes
    known = [name for name, _, _ in parts(options, {"teacher": "", "pruned": "", "narrow": ""})]
    if unknown := set(options.parts or ()) - set(known):
        parser.error(f"parts {sorted(unknown)} are unknown; choose from {known}")
    options.runs, options.out = (path.resolve() / ("quick" if options.quick else "") / options.size
                                 for path in (options.runs, options.out))  # fmt: skip
    models = make_family(options.size, options.runs / "models")
    failed = []
    for name, command, made in parts(options, models):
        result = options.out / f"{name}.json"
        if result.exists() or (options.parts and name not in options.parts):
            continue
        print(f"{name}: {' '.join(command)}", flush=True)
        code = run(command, end)
        if code is None:
            print(f"{options.minutes:g} minutes are over; the same command goes on with {name}")
            return 75
        if code:
            failed.append(f"{name} (exit code {code})")
            continue
        if not (files := sorted(map(Path, glob.glob(made)), key=lambda path: path.stat().st_mtime)):
            failed.append(f"{name} (it left no {made})")
            continue
        written = json.loads(files[-1].read_text())
        if all(row.get("cannot") for row in written.get("rows", [{}])):
            failed.append(f"{name} (no row could run)")
            continue
        weights = "trained" if options.size == "shapes" else "random: PSNR is numerical error, CLIP says nothing"
        write_json(result, {"weights": weights, "command": command, "environment": environment(), **written})
    print(f"failed: {', '.join(failed)}" if failed else f"all is in {options.out}")
    return 1 if failed else 0


def run(command: list[str], end: float) -> int | None:
    """The exit code; None where the time was up."""
    if end - time.monotonic() < 2 * GRACE_S:
        return None
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        return process.wait(end - time.monotonic() - GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        return None
    finally:  # compilers end late, and Ctrl-C does not reach another session
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def parts(options: argparse.Namespace, models: dict[str, str]) -> Iterator[Part]:
    """What is measured, the most wanted first."""
    import torch

    runs, on_gpu = options.runs, torch.cuda.is_available()
    teacher, half = models["teacher"], "bfloat16" if on_gpu else "float32"
    calls, small = ["latency.iterations=20"], ["eval.steps=20", "benchmark.images=8"]
    if options.quick:
        calls = ["latency.iterations=3", "latency.warmup=1"]
        small = ["eval.prompts=2", "benchmark.images=2", "eval.steps=3"]
    base = f"benchmark.base={{dtype: {half}}}"

    def job(name: str, experiment: str, named: dict[str, str], *overrides: str) -> Part:
        models_word = "models={" + ", ".join(f"{key}: {folder}" for key, folder in named.items()) + "}"
        command = [sys.executable, "train.py", f"+experiment={experiment}", f"name={name}", f"root={runs}", models_word]
        return name, [*command, *calls, *small, *overrides], f"{runs}/{name}/results.json"

    def benchmark(name: str, *overrides: str) -> Part:
        return job(name, "benchmark", {"teacher": teacher}, *overrides)

    yield job("cumulative", "cumulative", {**models, "few_steps": teacher}, *(QUICK_ROWS if options.quick else ()))
    kernels = f"benchmark.attention=[{'vanilla,cudnn' if options.quick else 'sdpa,vanilla,math,flash,efficient,cudnn'}]"
    plain = ["benchmark.compile=[eager]", "benchmark.batches=[1]"]
    yield benchmark("kernels", f"benchmark.dtype=[{half}]", kernels, base, *plain)
    formats = "benchmark.memory_format=[contiguous,channels_last]"
    dtypes = f"benchmark.dtype=[{'tf32,bfloat16' if options.quick else 'float32,tf32,float16,bfloat16'}]"
    yield benchmark("formats", dtypes, formats, *plain)
    ways = "eager,default,regional,reduce-overhead,max-autotune,cudagraphs" if on_gpu else "eager,cudagraphs"
    yield benchmark("compile", f"benchmark.compile=[{ways}]", f"benchmark.dtype=[{half}]", base,
                    "benchmark.batches=[1]", "benchmark.cold_start=true")  # fmt: skip
    yield job("pipelines", "pipelines", {"teacher": teacher, "pruned": models["pruned"]}, base,
              *(["benchmark.batches=[1]", "benchmark.tasks=[txt2img,two_controlnets]"] if options.quick
                else ["benchmark.batches=[1,4,16]"]),
              "benchmark.compile=[default]" if on_gpu else "benchmark.compile=[eager]")  # fmt: skip

    python, dtype = sys.executable, "float16" if on_gpu else "float32"
    blocks = [python, "train.py", "+experiment=latency_table", "name=blocks", f"root={runs}", "model=path",
              f"model.name_or_path={teacher}", f"latency.dtype={dtype}", *calls, "latency.seconds=3"]  # fmt: skip
    blocks += ["latency.additive_samples=2"] if options.quick else []
    yield "blocks", blocks, f"{runs}/blocks/latency.json"
    yield training(options, on_gpu)
    if options.size == "sd15":
        yield "decoder", [python, "benchmarks/decoder_speed.py", "--sizes", "64", "128", "--batches", "1", "4",
                          "--dtype", dtype, "--compile", "--seconds", "20", "--out", f"{runs}/decoder"], \
            f"{runs}/decoder/*.json"  # fmt: skip
        yield "distilling", [python, "benchmarks/distill_speed.py", "--sd15", "--batch", "4", "--rounds", "6", "--out",
                             f"{runs}/distilling"], f"{runs}/distilling/*.json"  # fmt: skip


def training(options: argparse.Namespace, on_gpu: bool) -> Part:
    """Stochastic-depth training, scoring, recovery, step and decoder distillation, a few steps each."""
    command = [sys.executable, "benchmarks/training_speed.py", "--size", options.size]
    if on_gpu:
        command += ["--precision", "bf16", "--batch", "4" if options.size == "sdxl" else "16"]
        command += ["--checkpointing"] if options.size == "sdxl" else []
    steps = ["--steps", "2", "--parts", "stochastic_depth", "decoder"] if options.quick else ["--steps", "12"]
    return "training", [*command, *steps, "--out", f"{options.runs}/training"], f"{options.runs}/training/results.json"


if __name__ == "__main__":
    open_console()
    sys.exit(main())
