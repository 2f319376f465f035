"""Reading what a run left in its directory, finished or not, into values the report draws from.

round-NN/latency.json, scores.json, decision.json   what blocks cost and give, and what was decided
round-00/budgets.json                               what would be decided for other budgets
round-NN/interactions.json                          which pairs of changes lose more, or less, than the sum
evaluation.json                                     the models side by side on prompts they were not chosen on
images/MODEL/…/NNN.png                              the same prompts and noise through each model
export/export_report.json, config.yaml              the export, and the configuration
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimstep.engine.files import load_json
from slimstep.engine.renamed import with_new_kind
from slimstep.eval.record import Evaluation, Point, read_evaluation
from slimstep.models.architecture import Architecture, Levels, as_architecture, is_removed, num_levels, unet_levels
from slimstep.models.card import read_export_report

CLIP = "CLIP"  # what pages call the scorer's metric


@dataclass(frozen=True)
class Block:
    """One block in one round: the CLIP its removal loses, its standard error, its milliseconds; None: not measured.
    `at_once`: where that is after local recovery, what was lost before."""

    path: str
    delta_clip: float | None = None
    se: float | None = None
    ms: float | None = None
    at_once: float | None = None

    @property
    def clip_per_ms(self) -> float | None:
        """What the search ranks by; None where the block was not scored or removing it saves nothing."""
        return self.delta_clip / self.ms if self.delta_clip is not None and self.ms and self.ms > 0 else None


@dataclass(frozen=True)
class Round:
    """One round of the search; a file the run has not written yet is None."""

    name: str
    latency: dict[str, Any] | None
    scores: dict[str, Any] | None
    decision: dict[str, Any] | None
    budgets: list[dict[str, Any]] | None = None
    interactions: dict[str, Any] | None = None

    @property
    def blocks(self) -> dict[str, Block]:
        """Every block that was timed or scored in this round, in order of execution."""
        ms = {path: entry["ms"] for path, entry in (self.latency or {"sites": {}})["sites"].items()}
        score = (self.scores or {"sites": {}})["sites"]
        scores = {path: (own["delta_clip"], own["se"]) for path, own in score.items()}
        first = {path: own["before_recovery"]["delta_clip"] for path, own in score.items() if "before_recovery" in own}
        return {
            path: Block(path, *scores.get(path, (None, None)), ms.get(path), first.get(path))
            for path in {**ms, **score}
        }

    @property
    def architecture(self) -> Architecture:
        """The architecture that this round decided on; that of the whole network where it has not."""
        return as_architecture(self.decision["after"]) if self.decision else {}


def ranked_by(scores: Mapping[str, Any] | None) -> str:
    """What pages call the metric of a scores.json: CLIP, or the name that search.metric gave."""
    return (scores or {}).get("protocol", {}).get("metric", CLIP)


@dataclass(frozen=True)
class Model(Point):
    """An evaluated model of a pruning run, with the milliseconds of its denoiser."""

    ms: float = 0.0

    @property
    def parameters(self) -> int:
        return self.facts["parameters"]["UNet"]

    @property
    def gflops(self) -> float:
        return self.facts["gflops"]


@dataclass(frozen=True)
class RunRecord:
    """All that a run directory says."""

    path: Path
    rounds: tuple[Round, ...]
    evaluation: Evaluation | None
    prompts: tuple[str, ...]
    images: Mapping[str, tuple[Path, ...]]
    export_report: dict[str, Any] | None
    config: str | None

    @property
    def models(self) -> tuple[Model, ...]:
        """The evaluated models: the teacher first, the student last."""
        if not self.evaluation:
            return ()
        times = self.evaluation.facts["ms"]
        return tuple(Model(**vars(point), ms=times[point.model]) for point in self.evaluation.points)

    @property
    def ranked_by(self) -> str:
        """The metric of the block scores."""
        return next((ranked_by(r.scores) for r in self.rounds if r.scores), CLIP)

    @property
    def architecture(self) -> Architecture:
        """The architecture after the last decided round."""
        decided = [r.architecture for r in self.rounds if r.decision]
        return decided[-1] if decided else {}

    @property
    def predicted(self) -> dict[str, float]:
        """{round: the metric's difference to the teacher after it, by the sum of what its actions and earlier ones were
        scored to lose}; of rounds whose actions were all scored."""
        differences: dict[str, float] = {}
        total = 0.0
        for r in (r for r in self.rounds if r.decision):
            lost = [action["delta_clip"] for action in r.decision["actions"] if action["action"] != "copy"]
            if None in lost:
                break
            differences[r.name] = total = total - sum(lost)
        return differences

    @property
    def latest_blocks(self) -> dict[str, Block]:
        """Every block as it was last measured: a removed block keeps the value it was removed with, and one that a
        later round's screen left out the score and the milliseconds of the round that scored it."""
        latest: dict[str, Block] = {}
        for path, block in (item for r in self.rounds for item in r.blocks.items()):
            if path not in latest or block.delta_clip is not None or latest[path].delta_clip is None:
                latest[path] = block
        return latest

    @property
    def removed_in(self) -> dict[str, int]:
        """For each block that is gone, the number of the round whose decision removed it."""
        gone: dict[str, int] = {}
        for number, r in enumerate(self.rounds):
            after = r.architecture
            gone |= {s: number for s in self.latest_blocks if is_removed(s, after, self.levels) and s not in gone}
        return gone

    @property
    def levels(self) -> Levels:
        return unet_levels(num_levels(self.latest_blocks))


def is_search(path: str | Path) -> bool:
    """Whether a folder is a pruning run: one that has rounds."""
    return any(Path(path).glob("round-*/"))


def read_run(path: str | Path) -> RunRecord:
    """The record of a pruning run, as far as it got.

    Raises FileNotFoundError where there is no run at all, ValueError for a run of another job.
    """
    path = Path(path).resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"there is no run in {path}; give the directory that train.py wrote")
    folders = sorted(p for p in path.glob("round-*") if p.is_dir())
    names = ("latency", "scores", "decision", "budgets", "interactions")
    rounds = tuple(Round(p.name, *(read_json(p / f"{name}.json") for name in names)) for p in folders)
    evaluation = read_evaluation(path)
    if not folders and evaluation is None:
        raise FileNotFoundError(f"{path} holds no round-00 and no evaluation.json; give one that train.py wrote")
    if evaluation and "ms" not in evaluation.facts:
        raise ValueError(f"{path} is no run of prune_unet: its report.html and evaluation.json stand for themselves")
    images = {p.name: tuple(sorted(p.rglob("*.png"))) for p in sorted((path / "images").glob("*")) if p.is_dir()}
    config = path / "config.yaml"
    return RunRecord(
        path,
        rounds,
        evaluation,
        tuple(read_json(path / "images" / "prompts.json") or (evaluation.shown if evaluation else ())),
        images,
        read_export_report(path / "export"),
        config.read_text() if config.is_file() else None,
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file, None where it does not exist (yet)."""
    return load_json(path) if path.is_file() else None


def read_speed(path: Path) -> Any:
    """The results.json of a timed run, with its kind's present name; None where it does not exist."""
    results = read_json(path)
    return results and with_new_kind(results)


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def run_names(paths: Sequence[Path]) -> list[str]:
    """Each folder by the shortest end of its path that is no other's: 'evaluate', or 'sdxl/evaluate'."""

    def end(path: Path, length: int) -> str:
        return "/".join(path.parts[-length:])

    names = []
    for path in paths:
        lengths = range(1, len(path.parts))
        alone = (n for n in lengths if not any(end(other, n) == end(path, n) for other in paths if other != path))
        names.append(end(path, next(alone, len(path.parts))))
    return names
