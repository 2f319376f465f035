"""Finished runs on one page: python scripts/report.py runs/evaluate runs/benchmark runs/ladder --out reports/shapes"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.console import open_console
from engine.quiet import one_line


def main() -> int:
    """Prints the tables; returns the exit code, 1 where a run is missing or unfinished."""
    parser = argparse.ArgumentParser(
        description="Makes one page (HTML, with tables as Markdown and pictures as PNG) of finished runs: of any "
        "evaluations, benchmarks, ladders and pipelines tables, or of pruning runs. Models are compared with the first "
        "run's reference, paired by prompt."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, as train.py writes them")
    parser.add_argument("--out", default="report", metavar="DIR", help="where the files go (default: %(default)s)")
    parser.add_argument("--pages", action="store_true", help="also make each run's own report.html anew")
    options = parser.parse_args()
    from eval.pages.finished import report  # here, since --help needs none of it

    try:
        print(report(options.runs, options.out, options.pages))
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    print(Path(options.out).resolve() / "report.html")
    return 0


if __name__ == "__main__":
    open_console()
    sys.exit(main())
