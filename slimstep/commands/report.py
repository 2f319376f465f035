"""Finished runs on one page: slimstep report runs/evaluate runs/benchmark runs/cumulative --out reports/shapes"""

import argparse
import sys
from pathlib import Path

from slimstep.engine.quiet import one_line

SEVERAL = (
    "of any evaluations, benchmarks of all kinds and pipelines tables, or of pruning runs. Models are compared with "
    "the first run's reference, paired by prompt."
)


def main() -> int:
    """Prints the tables and writes the page; returns the exit code, 1 where a run is missing or unfinished."""
    parser = argparse.ArgumentParser(
        description=f"Makes one page (HTML, with tables as Markdown and pictures as PNG) of finished runs: {SEVERAL}"
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, as train.py writes them")
    parser.add_argument("--out", default="report", metavar="DIR", help="where the files go (default: %(default)s)")
    parser.add_argument("--pages", action="store_true", help="also make each run's own report.html anew")
    options = parser.parse_args()
    code = print_report(options.runs, options.out, options.pages)
    if code == 0:
        print(Path(options.out).resolve() / "report.html")
    return code


def print_report(runs: list[str], out: str, pages: bool = False) -> int:
    """The tables on stdout, the page in the folder `out`; 1 where the runs cannot be compared, with one line that says
    why."""
    from slimstep.eval.pages.finished import report  # here, since --help needs none of it

    try:
        print(report(runs, out, pages))
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0
