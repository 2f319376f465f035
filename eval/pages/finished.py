"""Finished runs on one page, with their tables as text."""

from collections.abc import Sequence

from slimstep.eval.pages.comparison import compare_runs
from slimstep.eval.pages.evaluation_page import write_evaluation_report
from slimstep.eval.pages.results import read_results
from slimstep.eval.pages.results_page import compare_results
from slimstep.eval.pages.run_page import write_report
from slimstep.eval.pages.runs import is_search
from slimstep.eval.pages.speed_page import write_speed_report


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
