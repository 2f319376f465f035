"""Finished runs on one page: python scripts/report.py runs/evaluate runs/benchmark runs/ladder --out reports/shapes"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.comparison import compare_runs
from eval.evaluation_report import write_evaluation_report
from eval.report import write_report
from eval.results import read_results
from eval.results_report import compare_results
from eval.runs import is_search
from eval.speed_report import write_speed_report


def report(folders: Sequence[str], out: str, pages: bool) -> str:
    """Makes the page and returns its tables. ValueError for pruning runs among others."""
    searches = [folder for folder in folders if is_search(folder)]
    others = [(folder, read_results(folder).kind) for folder in folders if folder not in searches]
    if searches and others:
        folder, kind = others[0]
        raise ValueError(
            f"{searches[0]} is a pruning run, {folder} holds results of {kind}: they go on different pages; "
            f"+experiment=evaluate models=[{searches[0]}/export] gives what goes with {folder}"
        )
    for folder in searches if pages else ():
        print(write_report(folder))
    for folder, kind in others if pages else ():
        print((write_evaluation_report if kind == "evaluation" else write_speed_report)(folder))
    return compare_runs(searches, out) if searches else compare_results(folders, out)


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
    try:
        print(report(options.runs, options.out, options.pages))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(Path(options.out).resolve() / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
