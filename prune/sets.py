"""Whole sets of changes, measured by images with all of them: what sums of single scores only predict.

Every set is a file of its round, named by what is in it, and is not measured again: a killed search finds what it had
measured, and a set that comes up twice costs nothing.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from slimstep.data.prompts import PromptSet
from slimstep.engine.run import Run
from slimstep.eval.evaluator import PARTIAL
from slimstep.eval.pages.text import decimals, fixed
from slimstep.prune.evolve import BlockValue
from slimstep.prune.scores import Drawing, block_record

log = logging.getLogger("slimstep")


class MeasuredSets:
    """What sets of changes lose on all prompts, paired with the network without them. `rows` are those that a search
    had measured: {labels: row}, as scores.json has them of single changes."""

    def __init__(self, run: Run, stage: str, drawing: Drawing, prompts: PromptSet):
        self.run, self.stage, self.drawing, self.prompts = run, stage, drawing, prompts
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {}

    def __call__(self, labels: tuple[str, ...]) -> BlockValue:
        """The loss of a set in the form of a block's, so that it has a price (evolve.py)."""
        row = self.row(labels)
        error = math.nan if row["picture_error"] is None else row["picture_error"]
        self.rows[tuple(row["changes"])] = row
        return BlockValue(" + ".join(row["changes"]), row["delta_clip"], row["se"], 0.0, picture_error=error)

    def row(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """As scores.json has it of a single change; read where the set was measured before."""
        labels = tuple(sorted(labels))
        name = hashlib.sha256("\n".join(labels).encode()).hexdigest()[:12]
        return self.run.json(f"{self.stage}/sets/{name}.json", lambda: self.measured(labels, name))

    def measured(self, labels: tuple[str, ...], name: str) -> dict[str, Any]:
        keep = self.run.path / PARTIAL / f"{self.stage}-sets-{name}"
        values_1P2 = self.drawn([labels], keep)
        lost_P = self.prompts.by_text(values_1P2[0, :, 0]).tolist()
        row = block_record(lost_P, values_1P2[0, :, 1].mean().item(), self.drawing.others_psnr)
        lost = f"{row['delta_clip']:+.{decimals(row['se'])}f} ± {fixed(row['se'])}"
        log.info(f"{self.stage}: {len(labels)} changes together lose {lost} by images")
        return {"changes": list(labels), **row}

    def lost(self, sets: Sequence[tuple[str, ...]], keep: Path) -> Tensor:
        """[sets, distinct prompts], in the metric's units."""
        return self.prompts.by_text(self.drawn(sets, keep)[..., 0])

    def drawn(self, sets: Sequence[tuple[str, ...]], keep: Path) -> Tensor:
        """[sets, prompts, 2] of Drawing.changes."""
        every = range(len(self.prompts))
        self.drawing.base(every, keep / "base")
        values = self.drawing.changes([(labels, index) for labels in sets for index in every], keep / "sets")
        return values.reshape(len(sets), len(self.prompts), 2)
