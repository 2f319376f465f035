"""The end of a job: its page and pictures are made once, the same goes to a tracker, and the table is printed."""

import logging
import shutil
from collections.abc import Callable

from PIL import Image

from slimstep.engine.run import FINISHED, Run
from slimstep.eval.evaluator import PARTIAL
from slimstep.eval.pages.tables import Table

log = logging.getLogger("slimstep")


def report(run: Run, write: Callable[[], object], table: Callable[[], str]) -> None:
    """Where the run has no page yet `write()` makes it; what was kept of unfinished work goes. `table()` is printed."""
    page, new = run.path / FINISHED, not run.made(FINISHED)
    if run.accelerator.is_main_process:
        if new:
            shutil.rmtree(run.path / PARTIAL, ignore_errors=True)
            write()
        print(table())
        log.info(f"report: {page.resolve()}{'' if new else ' (finished before; nothing was made anew)'}")
    run.accelerator.wait_for_everyone()


def track_table(run: Run, name: str, table: Table) -> None:
    """A table, and the pictures of the run's report, for a tracker if there is one."""
    if run.tracker:
        run.tracker.table(name, list(table.header), [list(row) for row in table.rows])
        for path in sorted((run.path / "report").glob("*.png")):
            run.tracker.images(f"report/{path.stem}", [Image.open(path).convert("RGB")], [path.stem])
