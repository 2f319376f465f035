"""The tables of finished runs, and no files: slimstep compare runs/evaluate runs/evaluate-seed-1"""

import argparse
from tempfile import TemporaryDirectory

from slimstep.commands.report import SEVERAL, print_report


def main() -> int:
    """Prints the tables; returns the exit code, 1 where a run is missing or unfinished."""
    parser = argparse.ArgumentParser(description=f"Prints the tables {SEVERAL} `slimstep report` also makes a page.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, as train.py writes them")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:  # for the pictures, which a terminal does not show
        return print_report(options.runs, folder)
