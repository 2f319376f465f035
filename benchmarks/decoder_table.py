"""Which channels of the decoder to keep, and which latents to teach it on? Half-width decoders side by side.

    python benchmarks/decoder_table.py --root runs/decoders

Every row is the decoder job on the bundled toy model, evaluated on the same held-out latents. The first rows differ in
how channels are chosen, and are shown before and after a short training; one in what happens to the groups of the
norms; the others in what they are trained on: latents that the teacher samples (as all above), encoded images, or half
of each. The table and every evaluation go to --out. Started again, it continues.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.launching import run_job
from slimstep.engine.console import open_console
from slimstep.engine.files import write_json, write_text
from slimstep.eval.pages.tables import markdown_table
from slimstep.eval.pages.text import difference
from slimstep.eval.pages.vae_page import measures
from slimstep.eval.record import Point, read_evaluation

ROWS = {
    **{name: [f"decoder.importance={name}"]
       for name in ("magnitude", "taylor", "activation_energy", "random", "first")},
    "per-group pruning": ["decoder.norm_groups=per_group"],
    "real latents": ["latents.real_share=1"],
    "half real": ["latents.real_share=0.5"],
}
HEADER = ["run", "decoder", "CLIP against the teacher's", "sampled latents: PSNR", "SSIM", "features",
          "real latents: PSNR", "SSIM", "features", "to the real image: PSNR"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/decoders"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/decoder-table"), help="where the results go")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of every row")
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), help="rows to run")
    parser.add_argument("overrides", nargs="*", help="further overrides of the experiment, for all rows")
    options = parser.parse_args()
    for name in options.only:
        place = [f"root={options.root}", f"name={name.replace(' ', '-')}", f"train.steps={options.steps}"]
        times = ["latency.iterations=2", "decoder.batches=[1]"]
        run_job("prune_vae", [*place, *times, *ROWS[name], *options.overrides])
        write_results(options)


def write_results(options: argparse.Namespace) -> None:
    """The table and the evaluations of the rows that are finished."""
    found = {name: read_evaluation(options.root / name.replace(" ", "-")) for name in options.only}
    done = {name: evaluation for name, evaluation in found.items() if evaluation}
    rows = [cells(name, point) for name, evaluation in done.items() for point in evaluation.points[1:]]
    write_text(options.out / "table.md", markdown_table(HEADER, rows))
    first = next(iter(done.values()))
    facts = {key: getattr(first, key) for key in ("n", "facts", "prompts_hash", "protocol", "environment")}
    decoders = {name: [rounded(point) for point in evaluation.points] for name, evaluation in done.items()}
    write_json(options.out / "results.json", {**facts, "steps": options.steps, "decoders": decoders})
    print(markdown_table(HEADER, rows), flush=True)


def cells(name: str, point: Point) -> list[str]:
    when = {"pruned": "before training", "student": "after"}[point.model]
    to_teacher = [*measures(point, ""), *measures(point, "real_")]
    return [name, when, difference(point.versus_reference), *to_teacher, measures(point, "image_")[0]]


def rounded(point: Point) -> dict:
    """A point with its values per prompt to what matters, for a file that is kept."""
    metrics = {name: own and {**own, "per_prompt": [round(value, 4) for value in own["per_prompt"]]}
               for name, own in point.metrics.items()}  # fmt: skip
    return {**asdict(point), "metrics": metrics}


if __name__ == "__main__":
    open_console()
    main()
