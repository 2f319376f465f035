"""Size and steps together: a network and a pruned one, each at the teacher's steps and at few, in one table.

    python benchmarks/few_step_table.py --full runs/dmd --pruned runs/dmd-pruned --out benchmarks/few-step

The runs are finished distillations (`+experiment=distill_steps`) of one teacher, on the same prompts, with the same
scorer and seed; other ones are refused. Those of --pruned have a `distillation.student`. Several runs of a network may
be given, each with students of other numbers of steps. `evaluation.diversity_prompts=64` of the runs fills the column
of diversity. To --out go table.md, table.json with the values of every prompt, and report.html.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimstep.engine.console import open_console
from slimstep.eval.pages.few_step import write_few_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", type=Path, nargs="+", required=True, metavar="RUN", help="the teacher's network")
    parser.add_argument("--pruned", type=Path, nargs="+", default=[], metavar="RUN", help="a smaller network")
    parser.add_argument("--guidance", type=float, help="of the teacher; where the runs have students at several")
    parser.add_argument("--out", type=Path, required=True, help="where the table goes")
    options = parser.parse_args()
    runs = [("full", run) for run in options.full] + [("pruned", run) for run in options.pruned]
    try:
        print(write_few_step(runs, options.out, options.guidance))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    open_console()
    main()
