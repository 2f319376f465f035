"""Block scoring of the bundled model by this checkout, beside another one of this project.

    git worktree add ../before 44e7880
    python benchmarks/scoring_speed.py --before ../before

Both score every block on the same held-out captions, with what `+experiment=prune_unet` has by default: 64 prompts, 8
steps, guidance 2.5, batches of 64 images, all threads. Each is a process that stays loaded and works in turn, A B B A.
A speed is the ratio of wall times within a round; beside it stands that of CPU times. The scores of both are compared.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def work(checkout: str, num_prompts: int) -> None:
    """Scores all blocks with the code of `checkout` for every line of stdin; answers with seconds and scores."""
    sys.path.insert(0, checkout)
    from accelerate import Accelerator

    from slimstep.data.prompts import PromptSet
    from slimstep.data.shapes import shapes_prompts
    from slimstep.eval.sampling import Sampler
    from slimstep.models.pipeline import load_pipeline
    from slimstep.prune.scores import score_blocks

    is_early = (Path(checkout) / "eval/clip.py").exists()
    ClipScorer = import_module("eval.clip" if is_early else "slimstep.eval.metrics.clip").ClipScorer
    pipeline = load_pipeline(ROOT / "assets/shapes")
    prompts = PromptSet(shapes_prompts("heldout", num_prompts, 0).prompts, "held-out captions")
    sampler, scorer = Sampler(pipeline, 8, 2.5), ClipScorer(f"local-dir:{ROOT}/assets/shapes-clip")
    if (Path(checkout) / "eval/metrics/metric.py").exists():  # earlier ones score blocks by a scorer alone
        scorer = import_module("slimstep.eval.metrics.metric").as_metric(scorer)
    print("ready", flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        table = score_blocks(pipeline.unet, sampler, scorer, prompts, 64, Accelerator(cpu=True))
        seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        lost = {block: score["delta_clip"] for block, score in table.record({})["sites"].items()}
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({**seconds, "peak_gib": peak_gib, "lost": lost}), flush=True)


class Worker:
    """A process that scores when asked."""

    def __init__(self, checkout: Path, num_prompts: int) -> None:
        command = [sys.executable, __file__, "--work", str(checkout), "--prompts", str(num_prompts)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout)
        assert self.process.stdout.readline() == "ready\n", f"{checkout} cannot be loaded"

    def __call__(self) -> dict:
        print(file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=2, help="of A B B A (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/scoring-speed/shapes-cpu.json")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work, options.prompts)
    sys.path.insert(0, str(ROOT))
    from slimstep.engine.environment import environment
    from slimstep.engine.files import write_json

    workers = {"before": Worker(options.before.resolve(), options.prompts), "now": Worker(ROOT, options.prompts)}
    runs: dict[str, list[dict]] = {name: [] for name in workers}
    for _ in range(options.rounds):
        for name in ("before", "now", "now", "before"):
            runs[name].append(workers[name]())
            print(f"{name}: {runs[name][-1]['wall']:.1f} s, CPU {runs[name][-1]['cpu']:.1f} s", flush=True)
    pairs = list(zip(runs["before"], runs["now"], strict=True))
    ratios = {clock: [before[clock] / now[clock] for before, now in pairs] for clock in ("wall", "cpu")}
    before, now = (runs[name][0]["lost"] for name in workers)
    ranks = [sorted(lost, key=lost.get) for lost in (before, now)]
    head = ["git", "-C", str(options.before), "rev-parse", "--short", "HEAD"]
    result = {
        "before": subprocess.check_output(head, text=True).strip(),
        "environment": environment(),
        "prompts": options.prompts,
        "times_as_fast": {c: {"median": statistics.median(r), "range": [min(r), max(r)]} for c, r in ratios.items()},
        "largest_difference_of_scores": max(abs(before[block] - now[block]) for block in before),
        "same_order": ranks[0] == ranks[1],
        "runs": {name: [{k: v for k, v in run.items() if k != "lost"} for run in made] for name, made in runs.items()},
    }
    write_json(options.out, result)
    print(json.dumps({k: v for k, v in result.items() if k not in ("runs", "environment")}, indent=1))


if __name__ == "__main__":
    main()
