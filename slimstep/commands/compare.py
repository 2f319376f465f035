"""Finished runs beside each other: their tables, or their students on a page where one types a prompt.

    slimstep compare runs/evaluate runs/evaluate-seed-1
    slimstep compare runs/prune_unet runs/distill_steps/steps-4/export --serve

The second needs Gradio (pip install 'slimstep[serve]') and shows the teacher and all exports of these runs, from the
same noise, with their times. The page is for this machine alone.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from slimstep.commands.report import print_report
from slimstep.engine.quiet import one_line


def main() -> int:
    """Prints the tables or serves the page; returns the exit code, 1 where a run is missing or unfinished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, as train.py writes them")
    parser.add_argument("--serve", action="store_true", help="the students on a local page; exports may be named, too")
    parser.add_argument("--port", type=int, help="of the page (default: the first that is free from 7860 on)")
    options = parser.parse_args()
    if options.serve:
        return serve_students(options)
    with TemporaryDirectory() as folder:  # for the pictures, which a terminal does not show
        return print_report(options.runs, folder)


def serve_students(options: argparse.Namespace) -> int:
    if not find_spec("gradio"):
        print("error: --serve needs Gradio: pip install 'slimstep[serve]'", file=sys.stderr)
        return 1
    from slimstep.eval.serving import serve
    from slimstep.eval.side_by_side import side_models

    try:
        models = side_models([Path(run) for run in options.runs])
        print(f"shows {', '.join(model.name for model in models)}")
        serve(models, options.port)
    except (OSError, ValueError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0
