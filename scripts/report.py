"""Runs side by side: python scripts/report.py runs/prune_unet runs/random runs/bk_sdm --out reports/shapes"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.comparison import compare_runs
from eval.report import write_report


def main() -> int:
    """Prints the table; returns the exit code, 1 where a run is missing or unfinished."""
    parser = argparse.ArgumentParser(
        description="Makes a table (Markdown and HTML) and a picture of CLIP against latency over finished runs. "
        "Students are compared with their teacher and with the first run's student, paired by prompt."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, as train.py writes them")
    parser.add_argument("--out", default="report", metavar="DIR", help="where the files go (default: %(default)s)")
    parser.add_argument("--pages", action="store_true", help="also make each run's own report.html anew")
    options = parser.parse_args()
    try:
        for run in options.runs if options.pages else ():
            print(write_report(run))
        print(compare_runs(options.runs, options.out))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(Path(options.out).resolve() / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
